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


def random_mask(like: NamedArrays, density: float, rng: np.random.Generator) -> dict[str, NDArray[np.bool_]]:
    """Return a mask that keeps a random `density` of each matrix, at least one entry, and all of each vector.

    Vectors (biases, norms) are few and matter much, so that sparse training leaves them whole.

    >>> mask = random_mask({"w": np.zeros((4, 5), np.float32)}, 0.25, np.random.default_rng(0))
    >>> int(mask["w"].sum())
    5
    """
    mask = {}
    for name, array in like.items():
        flat = np.ones(array.size, np.bool_)
        if array.ndim >= 2 and array.size:
            flat[:] = False
            flat[rng.choice(array.size, max(1, round(density * array.size)), replace=False)] = True
        mask[name] = flat.reshape(array.shape)
    return mask


def prune_and_regrow(
    mask: Mask, magnitude: NamedArrays, growth: NamedArrays, rate: float
) -> dict[str, NDArray[np.bool_]]:
    """Return a mask of the same density per array that moved a share `rate` of its kept entries.

    Of each array, the kept entries of least `magnitude` go and as many others of largest `growth` come; none
    that goes comes back at once. Ties go to the lower index.
    """
    moved = {}
    for name, kept in mask.items():
        flat = kept.ravel().copy()
        inside, outside = np.flatnonzero(flat), np.flatnonzero(~flat)
        count = min(int(rate * inside.size), outside.size)
        if count:
            least = np.argsort(np.abs(magnitude[name].ravel()[inside]), kind="stable")[:count]
            most = np.argsort(-np.abs(growth[name].ravel()[outside]), kind="stable")[:count]
            flat[inside[least]], flat[outside[most]] = False, True
        moved[name] = flat.reshape(kept.shape)
    return moved
