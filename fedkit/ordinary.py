"""Ordinary arrays of any numeric type, as float32 arrays that are coded and data sent *beside* the frames.

==========================================  =================================================================
an app's array                              how it is sent
==========================================  =================================================================
float16, float32, float64                   in the frames, as float32; the app gets its own type back
integers and booleans                       beside the frames, lossless; the mean is rounded
``running_mean`` and ``running_var``        beside the frames, lossless
==========================================  =================================================================

A batch counter grows by hundreds where weights move by thousandths: among the weights it would set the scale of a
whole frame, and alone decide which clients skip. A variance must not become negative, as a quantized one may.
Clients with different parts (`fedkit.submodels`, TAC) have everything in the frames, since data beside them is not
cut into parts.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays
from fedkit.errors import ConfigError, SchemaMismatchError, WireFormatError

STATISTICS: Final = ("running_mean", "running_var")  # PyTorch's names, at the end of an array's
_PLACE: Final = re.compile(r"^(slot|cluster)-\d+/")  # the prefix that TAC puts before a name
MAX_BYTES: Final = 2**28  # that a client accepts beside the frames

Beside: TypeAlias = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Ordinary:
    """What float32 arrays cannot represent of an app's arrays."""

    order: Sequence[str] = ()  # of all names, if some are sent beside
    dtypes: Mapping[str, str] = field(default_factory=dict)  # of those in the frames, where it is not float32
    beside: Beside = field(default_factory=dict)

    def record(self, arrays: NamedArrays) -> ArrayRecord:
        """Return float32 arrays and what is sent beside them as the app's own; inverse of `split`."""
        own = {name: as_type(array, self.dtype(name)) for name, array in arrays.items()} | dict(self.beside)
        return ArrayRecord({name: Array(own[name]) for name in self.order or own})

    def dtype(self, name: str) -> str:
        """Return the type of an array that is sent in the frames; that of a slot or cluster is its adapter's."""
        plain = _PLACE.sub("", name)
        return self.dtypes.get(name) or self.dtypes.get(plain) or self.dtypes.get(f"cluster-0/{plain}", "float32")

    def pack(self) -> bytes:
        """Return it as bytes; empty if there is nothing to say."""
        if not self.order and not self.dtypes:
            return b""
        beside = [(name, str(array.dtype), array.shape) for name, array in self.beside.items()]
        head = json.dumps([list(self.order), dict(self.dtypes), beside], separators=(",", ":")).encode()
        return zlib.compress(len(head).to_bytes(4, "little") + head + _raw(self.beside))

    @classmethod
    def unpack(cls, data: bytes) -> Ordinary:
        """Return what `pack` packed; raises WireFormatError."""
        if not data:
            return cls()
        try:
            plain = _inflate(data, MAX_BYTES)
            end = 4 + int.from_bytes(plain[:4], "little")
            order, dtypes, beside = json.loads(plain[4:end])
            like = {str(name): _empty(dtype, shape) for name, dtype, shape in beside}
            return cls(
                [str(n) for n in order], {str(k): str(v) for k, v in dtypes.items()}, _cut(plain[end:], like)
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise WireFormatError(f"what goes beside the frames cannot be read ({error}).") from None


def split(
    record: ArrayRecord, beside: Sequence[str] | None = None
) -> tuple[dict[str, NDArray[np.float32]], Ordinary]:
    """Return a record's arrays in float32, and everything else about them.

    Parameters
    ----------
    record : ArrayRecord
        An app's own arrays.
    beside : sequence of str, optional
        The names of those sent beside the frames; if unset, as in the table above.

    Raises
    ------
    ConfigError
        For an array that is not numeric, or is complex.
    """
    arrays: dict[str, NDArray[np.float32]] = {}
    dtypes: dict[str, str] = {}
    apart: dict[str, NDArray[Any]] = {}
    for name, array in record.items():
        own = array.numpy()
        if own.dtype.kind not in "fiub":
            raise ConfigError(
                f"array {name!r}: expected real numbers, got {own.dtype}. Leave it out of the arrays."
            )
        if name in beside if beside is not None else own.dtype.kind != "f" or name.endswith(STATISTICS):
            apart[name] = own
            continue
        arrays[name] = np.asarray(own, np.float32)
        if own.dtype != np.float32:
            dtypes[name] = str(own.dtype)
    return arrays, Ordinary(list(record) if apart else (), dtypes, apart)


def to_arrays(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """Return all arrays of an ordinary ArrayRecord as float32 arrays."""
    return {name: np.asarray(array.numpy(), np.float32) for name, array in record.items()}


def from_arrays(arrays: NamedArrays) -> ArrayRecord:
    """Return arrays as an ordinary ArrayRecord; inverse of `to_arrays`."""
    return ArrayRecord({name: Array(np.asarray(array, np.float32)) for name, array in arrays.items()})


def as_type(array: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Return an array in another type; for an integer type, values are rounded, not truncated."""
    kind = np.dtype(dtype)
    return np.asarray(np.rint(array) if kind.kind != "f" and array.dtype.kind == "f" else array, kind)


def pack_values(beside: Beside, like: Beside) -> bytes:
    """Return a client's own values of what is sent beside the frames, in the types of `like`.

    Raises
    ------
    SchemaMismatchError
        If one is missing, or of another shape.
    """
    for name, expected in like.items():
        if name not in beside or beside[name].shape != expected.shape:
            raise SchemaMismatchError(f"array {name!r}: expected shape {expected.shape} in the app's reply.")
    if not like:
        return b""
    return zlib.compress(_raw({name: as_type(beside[name], str(a.dtype)) for name, a in like.items()}))


def unpack_values(data: bytes, like: Beside) -> Beside:
    """Return the values of `pack_values`; raises WireFormatError, also for values that are not finite."""
    if not like and not data:
        return {}
    try:
        found = _cut(_inflate(data, sum(array.nbytes for array in like.values())), like)
    except ValueError as error:
        raise WireFormatError(f"what goes beside the frames cannot be read ({error}).") from None
    for name, array in found.items():
        if not np.isfinite(array).all():
            raise WireFormatError(f"array {name!r} holds NaN or infinite values.")
    return found


def mean(all_values: Sequence[tuple[float, Beside]], like: Beside) -> Beside:
    """Return the weighted mean of (weight, arrays) pairs, in the types of `like`.

    Where all values are equal, the mean is that value, even if it is a whole number that no float can hold.
    """
    total = math.fsum(weight for weight, _ in all_values)
    found = {}
    for name, array in like.items():
        means = np.sum([w / total * own[name].astype(np.float64) for w, own in all_values], axis=0)
        if array.dtype.kind in "iu":
            least, most = float(np.iinfo(array.dtype).min), float(np.iinfo(array.dtype).max)
            means = np.clip(
                means, least, most if int(most) <= np.iinfo(array.dtype).max else np.nextafter(most, 0)
            )
        first = all_values[0][1][name]
        same = np.all([own[name] == first for _, own in all_values], axis=0)
        found[name] = np.where(same, first, as_type(means, str(array.dtype)))
    return found


def _raw(beside: Beside) -> bytes:
    return b"".join(array.astype(array.dtype.newbyteorder("<")).tobytes() for array in beside.values())


def _cut(data: bytes, like: Beside) -> Beside:
    """Return bytes as arrays like those in `like`; raises ValueError."""
    if len(data) != sum(array.nbytes for array in like.values()):
        raise ValueError("of another length than expected")
    arrays, start = {}, 0
    for name, array in like.items():
        little = np.frombuffer(data, array.dtype.newbyteorder("<"), array.size, start)
        arrays[name] = little.astype(array.dtype).reshape(array.shape)
        start += array.nbytes
    return arrays


def _empty(dtype: str, shape: Sequence[int]) -> NDArray[Any]:
    kind = np.dtype(str(dtype))
    if kind.kind not in "fiub" or min(shape, default=0) < 0:
        raise ValueError(f"no array of type {dtype} and shape {shape}")
    return np.broadcast_to(np.zeros((), kind), tuple(int(n) for n in shape))


def _inflate(data: bytes, size: int) -> bytes:
    """Return at most `size` bytes; raises ValueError if there are more, or they are damaged."""
    unpacking = zlib.decompressobj()
    try:
        plain = unpacking.decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if not unpacking.eof or len(plain) > size:
        raise ValueError("cut short, or too long")
    return plain
