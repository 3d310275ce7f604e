"""Checkpoints of the server's state: plain values in one file, replaced after every round.

A tree consists of dicts, lists, tuples, numbers, strings, bytes, arrays and the dataclasses that the reader names.
The file is a numpy archive of the arrays and, as JSON, the tree that holds them. Nothing in it is ever executed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import StateError
from fedkit.files import read_archive, write_archive

Tree: TypeAlias = Any

NAME: Final = "checkpoint.npz"
FORMAT: Final = 1
_TREE: Final = "tree"


def save(folder: Path, tree: Mapping[str, Tree]) -> None:
    """Replace the checkpoint in `folder`.

    Raises
    ------
    StateError
        If it cannot be written; the former one is kept then.
    """
    arrays: dict[str, NDArray[Any]] = {}
    text = json.dumps({"format": FORMAT, "tree": _plain(tree, arrays)})
    write_archive(folder / NAME, {_TREE: np.frombuffer(text.encode(), np.uint8), **arrays})


def load(folder: Path, *types: type) -> dict[str, Tree] | None:
    """Return the tree of the checkpoint in `folder`, None if there is none; `types` are dataclasses it may hold.

    Raises
    ------
    StateError
        If the file is damaged, or of another format.
    """
    arrays = read_archive(folder / NAME)
    if arrays is None:
        return None
    try:
        saved = json.loads(arrays[_TREE].tobytes())
        if saved["format"] != FORMAT:
            raise StateError(f"{folder / NAME} has format {saved['format']}, expected {FORMAT}. Update fedkit.")
        tree: dict[str, Tree] = _tree(saved["tree"], arrays, {kind.__name__: kind for kind in types})
    except (KeyError, TypeError, ValueError, LookupError) as error:
        raise StateError(f"cannot read {folder / NAME} ({error!r}). Was it damaged?") from None
    return tree


def _plain(value: Tree, arrays: dict[str, NDArray[Any]]) -> Any:
    """Return a tree as JSON values, its arrays put into `arrays`; types that JSON lacks are ``{"KIND": ...}``."""

    def kept(array: NDArray[Any]) -> str:
        name = str(len(arrays))
        arrays[name] = array
        return name

    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.ndarray):
        return {"array": kept(value)}
    if isinstance(value, bytes):
        return {"bytes": kept(np.frombuffer(value, np.uint8))}
    if isinstance(value, Mapping):
        return {"dict": [[_plain(k, arrays), _plain(v, arrays)] for k, v in value.items()]}
    if isinstance(value, list | tuple):
        return {type(value).__name__: [_plain(item, arrays) for item in value]}
    if is_dataclass(value):
        inside = {field.name: _plain(getattr(value, field.name), arrays) for field in fields(value)}
        return {"dataclass": type(value).__name__, "fields": inside}
    raise TypeError(f"a checkpoint cannot hold a {type(value).__name__}.")


def _tree(value: Any, arrays: Mapping[str, NDArray[Any]], types: Mapping[str, type]) -> Tree:
    """Return the tree; inverse of `_plain`."""

    def inside(item: Any) -> Tree:
        return _tree(item, arrays, types)

    if not isinstance(value, dict):
        return value
    if "dataclass" in value:
        return types[value["dataclass"]](**{key: inside(item) for key, item in value["fields"].items()})
    ((kind, content),) = value.items()
    makers: dict[str, Callable[[Any], Tree]] = {
        "array": lambda name: arrays[name],
        "bytes": lambda name: arrays[name].tobytes(),
        "dict": lambda items: {inside(k): inside(v) for k, v in items},
        "list": lambda items: [inside(item) for item in items],
        "tuple": lambda items: tuple(inside(item) for item in items),
    }
    return makers[kind](content)
