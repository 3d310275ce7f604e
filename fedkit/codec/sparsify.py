"""Which entries are sent: boolean masks over named arrays, and the values under them.

`TopK` is of A. F. Aji and K. Heafield, "Sparse Communication for Distributed Gradient Descent", EMNLP 2017.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays, flatten, num_values, unflatten
from fedkit.errors import ConfigError, SchemaMismatchError


class Sparsifier(Protocol):
    """Chooses the entries of an update that are sent."""

    def mask(self, update: NamedArrays) -> dict[str, NDArray[np.bool_]]:
        """Return True for the entries to send."""


@dataclass(frozen=True, slots=True)
class TopK:
    """The share `density` of all entries that is largest in magnitude; ties go to the lower index.

    Law: no other mask of as many entries keeps more of the squared norm.
    """

    density: float

    def __post_init__(self) -> None:
        _check_density(self.density)

    def mask(self, update: NamedArrays) -> dict[str, NDArray[np.bool_]]:
        """Return True for the largest entries over all arrays."""
        sizes, kept = np.abs(flatten(update)), np.zeros(num_values(update), np.bool_)
        kept[_largest(sizes, self.density)] = True
        return unflatten(kept, like=update)


@dataclass(frozen=True, slots=True)
class Nonzero:
    """All entries except zeros: lossless."""

    def mask(self, update: NamedArrays) -> dict[str, NDArray[np.bool_]]:
        """Return True where an entry is not zero."""
        return {name: array != 0 for name, array in update.items()}


@dataclass(frozen=True, slots=True)
class Magnitude:
    """The entries that are at least `times` the root mean square of their array."""

    times: float = 2.0

    def __post_init__(self) -> None:
        if not self.times >= 0:
            raise ConfigError(f"times must be at least 0, got {self.times}.")

    def mask(self, update: NamedArrays) -> dict[str, NDArray[np.bool_]]:
        """Return True for the entries above the threshold of their array."""
        squares = {name: np.square(a, dtype=np.float64) for name, a in update.items()}
        return {name: a >= self.times**2 * (a.mean() if a.size else 0.0) for name, a in squares.items()}


@dataclass(frozen=True, slots=True)
class Structured:
    """Whole rows (axis 0) or columns (axis 1) of each matrix, the share `density` with the largest norms.

    In LoRA factors, each row of ``lora_A`` and column of ``lora_B`` belongs to one rank. Vectors are sent whole.
    Law: at least one row, or column, of each matrix is sent.
    """

    density: float
    axis: int = 0

    def __post_init__(self) -> None:
        _check_density(self.density)
        if self.axis not in (0, 1):
            raise ConfigError(f"axis: expected 0 (rows) or 1 (columns), got {self.axis}.")

    def mask(self, update: NamedArrays) -> dict[str, NDArray[np.bool_]]:
        """Return True for the rows, or columns, that are sent."""
        masks = {}
        for name, array in update.items():
            masks[name] = np.ones(array.shape, np.bool_)
            if array.ndim >= 2 and array.size:
                lines = np.moveaxis(array, self.axis, 0)
                norms = np.square(lines, dtype=np.float64).reshape(len(lines), -1).sum(axis=1)
                kept = np.zeros(len(lines), np.bool_)
                kept[_largest(norms, self.density)] = True
                np.moveaxis(masks[name], self.axis, 0)[~kept] = False
        return masks


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

    Vectors (biases, norms) are small and matter much, so sparse training leaves them whole.

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


@dataclass(frozen=True, slots=True)
class DrawnMask:
    """A mask that both sides draw: only its seed and density are sent.

    "Random mask" of J. Konečný et al., "Federated Learning: Strategies for Improving Communication Efficiency",
    2016, https://arxiv.org/abs/1610.05492. Like `random_mask`, it keeps `density` of each matrix, at least one
    entry, and all of each vector; but it is the same with every version of numpy: each entry of a matrix gets a
    random word, and the entries with the smallest words are kept.
    """

    seed: int  # below 2**64
    density: float

    def __post_init__(self) -> None:
        _check_density(self.density)

    def mask(self, like: NamedArrays) -> dict[str, NDArray[np.bool_]]:
        """Return True for the entries that are kept, in arrays with these names and shapes."""
        words, mask = np.random.Philox(key=self.seed), {}
        for name, array in like.items():
            flat = np.ones(array.size, np.bool_)
            if array.ndim >= 2 and array.size:
                flat[:] = False
                flat[_smallest(words.random_raw(array.size), kept_of(array.size, self.density))] = True
            mask[name] = flat.reshape(array.shape)
        return mask


def kept_of(size: int, density: float) -> int:
    """Return how many entries of a matrix are the share `density`, at least one."""
    return max(1, math.floor(density * size + 0.5))


def prune_and_regrow(
    mask: Mask, magnitude: NamedArrays, growth: NamedArrays, rate: float
) -> dict[str, NDArray[np.bool_]]:
    """Return a mask of the same density per array, with a share `rate` of its kept entries moved.

    In each array, the kept entries of least `magnitude` are dropped, and as many others of largest `growth` are
    added; no dropped entry is added back at once. Ties go to the lower index.
    """
    moved = {}
    for name, kept in mask.items():
        flat = kept.ravel().copy()
        inside, outside = np.flatnonzero(flat), np.flatnonzero(~flat)
        count = min(int(rate * inside.size), outside.size)
        if count:
            least = _smallest(np.abs(magnitude[name].ravel()[inside]), count)
            most = _smallest(-np.abs(growth[name].ravel()[outside]), count)
            flat[inside[least]], flat[outside[most]] = False, True
        moved[name] = flat.reshape(kept.shape)
    return moved


def _largest(sizes: NDArray[np.floating], density: float) -> NDArray[np.int64]:
    """Return the indices of the share `density` of `sizes` that is largest, at least one if there is any."""
    return _smallest(-sizes, min(sizes.size, max(1, round(density * sizes.size))))


def _smallest(values: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the indices of the `count` smallest values, in no order; ties go to the lower index."""
    if not count:
        return np.zeros(0, np.int64)
    bound = np.partition(values, count - 1)[count - 1]
    below = np.flatnonzero(values < bound)
    return np.concatenate([below, np.flatnonzero(values == bound)[: count - below.size]])


def _check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ConfigError(f"density must be above 0 and at most 1, got {density}.")
