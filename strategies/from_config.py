"""Reads a strategy's options from the run config: pairs as in Flower's own ``--run-config``, each one checked.

``strategy-options = "rate=0.5 downlink-rate=1.0 missing='mifa'"``: an option of the constructor that takes a
number, a string or a bool has its own name, in kebab-case. For options that take an object, `CODED` has the names.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import UnionType
from typing import Any, Final, Literal, Union, get_args, get_origin, get_type_hints

from flwr.serverapp.strategy import FedAvg

from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.sparsify import TopK
from fedkit.codec.wire import Codec
from fedkit.config import Scalar, as_type, check_keys, parse_overrides
from fedkit.errors import ConfigError
from fedkit.row_masks import RowMask

from .options import FedAvgOptions

CODED: Final[Mapping[str, tuple[str, type, Callable[[Any], Any]]]] = {
    "rate": ("quantizer", float, EntropyConstrained),  # bits per parameter, uplink
    "min-bits": ("quantizer", int, ZeroMidTread),  # AQUILA's adaptive level, with at least so many bits
    "downlink-rate": ("downlink", float, lambda rate: Codec(EntropyConstrained(rate)) if rate else None),
    "top-k": ("sparsifier", float, TopK),  # share of the entries
    "active-rank": ("row_mask", int, lambda rank: RowMask(active_rank=rank)),
}
_ELSEWHERE: Final = {"checkpoint", "seed"}  # the run config has keys of its own for these


def read_options(text: str, make: Callable[..., Any], of: type[FedAvg]) -> dict[str, Any]:
    """Return keyword arguments for `make`, which constructs a strategy of class `of`.

    Raises
    ------
    ConfigError
        If the text is not a list of pairs, an option is unknown (the message names the nearest known one), or a
        value does not have the option's type.
    """
    types = _scalars(make, of)
    known = {name.replace("_", "-"): name for name in types}
    coded = {key: made for key, made in CODED.items() if _takes(of, made[0])}
    given = parse_overrides([text], what="strategy-options")
    for key in given:
        if names := [
            other for other, (name, *_) in coded.items() if name == key.replace("-", "_") and key not in known
        ]:
            raise ConfigError(f"strategy-options: {key} takes an object, and here goes by {' or '.join(names)}.")
    check_keys(given, [*known, *coded], what=f"option of {of.__name__}")
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key in coded:
            name, kind, build = coded[key]
            if name in options:
                raise ConfigError(f"strategy-options: {key}: expected one option for the {name}, got two. Choose.")
            options[name] = build(as_type(key, value, kind))
        else:
            options[known[key]] = _checked(key, value, types[known[key]])
    return options


def _scalars(make: Callable[..., Any], of: type[FedAvg]) -> dict[str, tuple[Any, ...]]:
    """Return the options whose value may be a scalar, with the types or strings that each accepts."""
    found: dict[str, tuple[Any, ...]] = {}
    hints: dict[str, Any] = dict(get_type_hints(FedAvgOptions))
    for function in [*_constructors(of), *([make.__func__] if inspect.ismethod(make) else [])]:
        own = get_type_hints(function)
        named = [p.name for p in inspect.signature(function).parameters.values() if p.kind is not p.VAR_KEYWORD]
        hints |= {name: own[name] for name in named if name in own}
    for name, hint in hints.items():
        kinds = _kinds(hint)
        if kinds and name not in _ELSEWHERE:
            found[name] = kinds
    return found


def _kinds(hint: Any) -> tuple[Any, ...]:
    """Return which scalar types, and which strings, a type hint allows."""
    if get_origin(hint) is Literal:
        return get_args(hint)
    if hint in (bool, int, float, str):
        return (hint,)
    parts = get_args(hint) if get_origin(hint) in (Union, UnionType) else ()
    return tuple(kind for part in parts for kind in _kinds(part))


def _constructors(of: type[FedAvg]) -> list[Callable[..., None]]:
    """Return the constructors of a strategy class and of its bases up to FedAvg, the most derived last."""
    return [cls.__init__ for cls in reversed(of.__mro__) if issubclass(cls, FedAvg) and cls is not FedAvg]


def _takes(of: type[FedAvg], name: str) -> bool:
    return any(name in inspect.signature(function).parameters for function in _constructors(of))


def _checked(key: str, value: Scalar, kinds: tuple[Any, ...]) -> Scalar:
    texts = [kind for kind in kinds if isinstance(kind, str)]
    if value in texts or type(value) in kinds:
        return value
    if float in kinds and type(value) is int:
        return float(value)
    expected = ", ".join([*map(repr, texts), *(kind.__name__ for kind in kinds if isinstance(kind, type))])
    raise ConfigError(f"strategy-options: {key}: expected {expected}, got {value!r}.")
