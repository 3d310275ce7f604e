"""Which entries travel: boolean masks over named arrays, and the values under them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays
from fedkit.errors import SchemaMismatchError


def gather(arrays: NamedArrays, mask: Mask | None) -> list[NDArray[np.float32]]:
    """Return, per array, the kept values in C order; all of them if there is no mask.

    Raises
    ------
    SchemaMismatchError
        If the mask has other names or shapes than the arrays.
    """
    if mask is None:
        return [np.asarray(array, np.float32).ravel() for array in arrays.values()]
    if list(mask) != list(arrays) or any(mask[name].shape != arrays[name].shape for name in arrays):
        raise SchemaMismatchError("the mask has other names or shapes than the arrays.")
    return [np.asarray(array, np.float32)[mask[name]] for name, array in arrays.items()]


def scatter(
    values: list[NDArray[np.float32]], mask: Mask | None, *, like: NamedArrays
) -> dict[str, NDArray[np.float32]]:
    """Return dense arrays with `values` where the mask is True and zero elsewhere; inverse of `gather`."""
    if mask is None:
        return {name: part.reshape(array.shape) for (name, array), part in zip(like.items(), values, strict=True)}
    arrays = {}
    for (name, array), part in zip(like.items(), values, strict=True):
        arrays[name] = np.zeros(array.shape, np.float32)
        arrays[name][mask[name]] = part
    return arrays


def density(mask: Mask) -> float:
    """Return the share of kept entries, 0 to 1.

    >>> density({"w": np.array([True, False, False, False])})
    0.25
    """
    total = sum(part.size for part in mask.values())
    return sum(int(part.sum()) for part in mask.values()) / total if total else 1.0
