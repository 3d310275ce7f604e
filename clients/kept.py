"""What an app loads once, for all messages that its process serves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

P = ParamSpec("P")
T = TypeVar("T")

_kept: dict[Callable[..., Any], tuple[tuple[Any, Any], Any]] = {}  # by function: its arguments, what it returned


def kept(load: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return ``load(*args, **kwargs)``, or what that returned the last time, if the arguments are equal.

    What is changed in it stays changed: write the received arrays into a kept model before you use it.
    """
    arguments = args, kwargs
    if load not in _kept or _kept[load][0] != arguments:
        _kept.pop(load, None)  # first, lest there be two
        _kept[load] = arguments, load(*args, **kwargs)
    return cast(T, _kept[load][1])
