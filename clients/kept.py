"""Loading something once for all messages that an app's process serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

_kept: dict[Callable[..., Any], tuple[tuple[Any, Any], Any]] = {}  # by function: its last arguments and result


def kept(load: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return ``load(*args, **kwargs)``, or its last result if the arguments are equal to the last ones.

    Changes to the result persist: write the received arrays into a kept model before you use it.
    """
    arguments = args, kwargs
    if load not in _kept or _kept[load][0] != arguments:
        _kept.pop(load, None)  # first, so that two are never in memory
        _kept[load] = arguments, load(*args, **kwargs)
    return cast(T, _kept[load][1])
