"""Named float32 arrays as vectors: parameters, adapters and updates alike."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import CodecError, SchemaMismatchError

T = TypeVar("T", bound=np.generic)

NamedArrays: TypeAlias = Mapping[str, NDArray[np.float32]]
"""Names to arrays, in a fixed order. An update is local − received, so applying one adds."""

Mask: TypeAlias = Mapping[str, NDArray[np.bool_]]
"""Names to boolean arrays: True where the entry is kept."""


def zeros_like(like: NamedArrays) -> dict[str, NDArray[np.float32]]:
    """Return zeros with the names and shapes of `like`."""
    return {name: np.zeros(array.shape, np.float32) for name, array in like.items()}


def add(a: NamedArrays, b: NamedArrays) -> dict[str, NDArray[np.float32]]:
    """Return a + b, in float32."""
    check_same_schema(b, like=a)
    return {name: np.asarray(a[name] + b[name]) for name in a}  # keeps an array even without dimensions


def subtract(a: NamedArrays, b: NamedArrays) -> dict[str, NDArray[np.float32]]:
    """Return a − b, in float32."""
    check_same_schema(b, like=a)
    return {name: np.asarray(a[name] - b[name]) for name in a}


def squared_norm(arrays: NamedArrays) -> float:
    """Return the squared Euclidean norm over all entries, summed in float64.

    >>> squared_norm({"w": np.array([3.0, 4.0], np.float32)})
    25.0
    """
    return float(sum(np.vdot(v, v) for v in (a.astype(np.float64) for a in arrays.values())))


def num_values(arrays: NamedArrays) -> int:
    """Return the total number of entries."""
    return sum(array.size for array in arrays.values())


def flatten(arrays: NamedArrays) -> NDArray[np.float32]:
    """Return all entries as one vector, array after array, each in C order."""
    if not arrays:
        return np.zeros(0, np.float32)
    return np.concatenate([np.asarray(a, np.float32).ravel() for a in arrays.values()])


def flatten_mask(mask: Mask) -> NDArray[np.bool_]:
    """Return all entries of a mask as one vector."""
    return np.concatenate([np.zeros(0, np.bool_), *(part.ravel() for part in mask.values())])


def unflatten(vector: NDArray[T], *, like: NamedArrays) -> dict[str, NDArray[T]]:
    """Return `vector` cut into arrays with the names and shapes of `like`; inverse of `flatten`.

    Raises
    ------
    SchemaMismatchError
        If `vector` does not have exactly the number of entries that `like` has.
    """
    if vector.size != num_values(like):
        raise SchemaMismatchError(f"cannot cut {vector.size} values into arrays of {num_values(like)} in all.")
    arrays, start = {}, 0
    for name, array in like.items():
        arrays[name] = vector[start : start + array.size].reshape(array.shape)
        start += array.size
    return arrays


def schema_digest(arrays: NamedArrays | Mask) -> bytes:
    """Return 8 bytes that depend on the names and shapes, in order, and on nothing else."""
    text = "\n".join(f"{name}:{','.join(map(str, array.shape))}" for name, array in arrays.items())
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def check_same_schema(arrays: NamedArrays | Mask, *, like: NamedArrays | Mask) -> None:
    """Check that names, order and shapes agree.

    Raises
    ------
    SchemaMismatchError
        Naming the first array that differs.
    """
    for name, expected in like.items():
        if name not in arrays:
            extra = [repr(other) for other in arrays if other not in like]
            instead = f" There is {', '.join(extra[:3])} instead." if extra else ""
            raise SchemaMismatchError(f"array {name!r} is missing.{instead}")
        if arrays[name].shape != expected.shape:
            raise SchemaMismatchError(
                f"array {name!r}: expected shape {expected.shape}, got {arrays[name].shape}. "
                "Does this client use another LoRA rank, or another base model?"
            )
    if list(arrays) != list(like):
        extra = [name for name in arrays if name not in like]
        raise SchemaMismatchError(f"unexpected array {extra[0]!r}." if extra else "arrays in another order.")


def all_finite(array: NDArray[np.float32]) -> bool:
    """Return whether no entry is NaN or infinite; checks chunk by chunk, without a large temporary."""
    flat = array.reshape(-1)
    return all(np.isfinite(flat[start : start + 2**15]).all() for start in range(0, flat.size, 2**15))


def check_finite(arrays: NamedArrays) -> None:
    """Check that no entry is NaN or infinite.

    Raises
    ------
    CodecError
        Naming the first array that has one.
    """
    for name, array in arrays.items():
        if not all_finite(array):
            raise CodecError(f"array {name!r} holds NaN or infinite values. Did training diverge?")
