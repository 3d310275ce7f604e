"""The frame: a versioned, self-describing record of named arrays; the only encode and decode.

A frame says everything but names and shapes, which both sides know: it holds an 8-byte digest of them, so that
another schema is an error and not noise. A *snapshot* is a dense float32 frame that brings names and shapes
along, for a receiver that has nothing yet. `WIRE.md` is the specification, byte by byte.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from dataclasses import dataclass
from itertools import accumulate
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays, check_finite, num_values, schema_digest, unflatten
from fedkit.codec.entropy import pack_levels, pack_mask, packed_size, unpack_levels, unpack_mask
from fedkit.codec.quantize import MAX_BITS, Quantized, Quantizer, dequantize
from fedkit.codec.sparsify import gather, scatter
from fedkit.errors import CodecError, SchemaMismatchError, UnsupportedVersionError, WireFormatError

T = TypeVar("T", bound=np.generic)

VERSION: Final = 1
MAGIC: Final = b"fk"
FLOAT32: Final = 0  # the grid number of values that are not quantized
PER_ARRAY, MASKED = 1, 2  # flags
MAX_SCHEMA_BYTES: Final = 2**20  # names and shapes of a snapshot, as JSON

_HEADER = struct.Struct("<2sBBB8sIII")  # magic, version, grid, flags, schema digest, count, schema size, checksum
_GROUP = struct.Struct("<Bf")  # bits, scale


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed fields of a frame, checksum verified."""

    grid: int  # 0: float32 values; else how levels map to values, see `fedkit.codec.quantize`
    flags: int  # PER_ARRAY | MASKED
    digest: bytes  # of names and shapes, 8 bytes
    count: int  # values carried, over all arrays
    schema_size: int  # bytes of the schema section; 0 unless a snapshot


@dataclass(frozen=True, slots=True)
class Codec:
    """Updates to bytes: the values, or those under a mask, as float32 or as the levels of a quantizer."""

    quantizer: Quantizer | None = None  # None: float32, lossless

    def encode(self, update: NamedArrays, *, mask: Mask | None = None) -> bytes:
        """Return `update` as one frame.

        Raises
        ------
        CodecError
            If an entry is NaN or infinite, or the mask has another schema.
        """
        check_finite(update)
        parts = gather(update, mask)
        body = [] if mask is None else [pack_mask(np.concatenate([m.ravel() for m in mask.values()]))]
        flags = 0 if mask is None else MASKED
        if self.quantizer is None:
            body += [part.astype("<f4").tobytes() for part in parts]
            return _seal(FLOAT32, flags, update, sum(map(len, parts)), b"", body)
        if self.quantizer.per_array:
            flags |= PER_ARRAY
        else:
            parts = [np.concatenate(parts) if parts else np.zeros(0, np.float32)]
        groups = [self.quantizer.quantize(part) for part in parts]
        body += [_GROUP.pack(group.bits, group.scale) for group in groups]
        body += [pack_levels(group.levels, group.bits) for group in groups]
        return _seal(self.quantizer.grid, flags, update, sum(map(len, parts)), b"", body)


def decode(data: bytes, *, like: NamedArrays) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of a frame; entries that were masked out are zero.

    Parameters
    ----------
    data : bytes
        What `Codec.encode` returned.
    like : NamedArrays
        Arrays with the names, order and shapes that are expected. Nothing is allocated before they are checked.

    Raises
    ------
    CodecError
        For bytes that are damaged, of another version, or of another schema.
    """
    return decode_masked(data, like=like)[0]


def decode_masked(
    data: bytes, *, like: NamedArrays
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.bool_]] | None]:
    """Return the arrays of a frame and its mask, None if the frame is dense; raises as `decode`."""
    header = read_header(data)
    if header.digest != schema_digest(like):
        raise SchemaMismatchError(
            f"the frame holds {header.count} values of other names or shapes than the {num_values(like)} expected."
            " Does this node use another LoRA rank?"
        )
    body = _Reader(memoryview(data)[_HEADER.size + header.schema_size :])
    mask = _read_mask(body, like) if header.flags & MASKED else None
    sizes = [int(m.sum()) for m in mask.values()] if mask else [array.size for array in like.values()]
    if header.count != sum(sizes):
        raise WireFormatError(f"count: expected {sum(sizes)} values, got {header.count}.")
    values = _read_values(body, header, sizes)
    body.end()
    return scatter(values, mask, like=like), mask


def encode_snapshot(arrays: NamedArrays) -> bytes:
    """Return a dense float32 frame that brings its names and shapes along.

    Raises
    ------
    CodecError
        If an entry is NaN or infinite.
    """
    check_finite(arrays)
    text = json.dumps([[name, array.shape] for name, array in arrays.items()], separators=(",", ":"))
    if len(text) > MAX_SCHEMA_BYTES:
        raise CodecError(f"names and shapes take {len(text)} bytes: expected at most {MAX_SCHEMA_BYTES}.")
    body = [np.asarray(array, "<f4").tobytes() for array in arrays.values()]
    return _seal(FLOAT32, 0, arrays, num_values(arrays), zlib.compress(text.encode(), 9), body)


def decode_snapshot(data: bytes) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of a snapshot; inverse of `encode_snapshot`.

    Raises
    ------
    CodecError
        For bytes that are damaged, of another version, or not a snapshot.
    """
    header = read_header(data)
    if header.grid != FLOAT32 or header.flags or not header.schema_size:
        raise WireFormatError("expected a snapshot, got a frame without names and shapes.")
    shapes = _read_schema(data[_HEADER.size : _HEADER.size + header.schema_size])
    size = 4 * sum(math.prod(shape) for shape in shapes.values())
    if size != len(data) - _HEADER.size - header.schema_size:  # before anything of that size is made
        raise WireFormatError(f"the names and shapes call for {size} bytes of values, there are others.")
    return decode(data, like={name: np.empty(shape, np.float32) for name, shape in shapes.items()})


def read_header(data: bytes) -> Header:
    """Return the fixed fields of a frame after checking magic, version and checksum.

    Raises
    ------
    WireFormatError
        If these are not the bytes of an undamaged frame.
    UnsupportedVersionError
        If the frame is of another version.
    """
    if len(data) < _HEADER.size or data[:2] != MAGIC:
        raise WireFormatError("these bytes are not a fedkit frame.")
    if data[2] != VERSION:
        raise UnsupportedVersionError(f"frame version: expected {VERSION}, got {data[2]}. Update fedkit.")
    _, _, grid, flags, digest, count, schema_size, checksum = _HEADER.unpack_from(data)
    if checksum != _checksum(data[: _HEADER.size - 4], memoryview(data)[_HEADER.size :]):
        raise WireFormatError("the checksum does not match: the frame was damaged on its way.")
    if flags & ~(PER_ARRAY | MASKED):
        raise WireFormatError(f"flags: expected 0 to {PER_ARRAY | MASKED}, got {flags}.")
    return Header(grid, flags, digest, count, schema_size)


class _Reader:
    """Takes sections off a body, in order, and never more than there is."""

    def __init__(self, body: memoryview) -> None:
        self._body = body

    def take(self, size: int) -> memoryview:
        if size > len(self._body):
            raise WireFormatError(f"the frame is cut short: expected {size} more bytes, got {len(self._body)}.")
        taken, self._body = self._body[:size], self._body[size:]
        return taken

    def end(self) -> None:
        if len(self._body):
            raise WireFormatError(f"the frame has {len(self._body)} bytes too many.")


def _read_mask(body: _Reader, like: NamedArrays) -> dict[str, NDArray[np.bool_]]:
    total = num_values(like)
    flat = unpack_mask(body.take(packed_size(total, 1)), total)
    return unflatten(flat, like=like)


def _read_values(body: _Reader, header: Header, sizes: list[int]) -> list[NDArray[np.float32]]:
    if header.grid == FLOAT32:
        flat = np.frombuffer(body.take(4 * header.count), "<f4").astype(np.float32)
        if not np.isfinite(flat).all():
            raise WireFormatError("the frame holds NaN or infinite values.")
        return _split(flat, sizes)
    group_sizes = sizes if header.flags & PER_ARRAY else [header.count]
    heads = [_read_group(body) for _ in group_sizes]
    groups = [
        dequantize(header.grid, Quantized(bits, scale, unpack_levels(body.take(packed_size(n, bits)), n, bits)))
        for (bits, scale), n in zip(heads, group_sizes, strict=True)
    ]
    return groups if header.flags & PER_ARRAY else _split(groups[0], sizes)


def _split(flat: NDArray[T], sizes: list[int]) -> list[NDArray[T]]:
    return [flat[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]


def _read_group(body: _Reader) -> tuple[int, float]:
    bits, scale = _GROUP.unpack(body.take(_GROUP.size))
    if bits > MAX_BITS or not np.isfinite(scale) or scale < 0:
        raise WireFormatError(
            f"a group of {bits} bits and scale {scale}: expected 0 to {MAX_BITS}, and a finite scale."
        )
    return bits, scale


def _read_schema(section: bytes) -> dict[str, tuple[int, ...]]:
    """Return names and shapes; every limit is checked before anything of that size is made."""
    try:
        text = zlib.decompressobj().decompress(section, MAX_SCHEMA_BYTES)
        shapes = {str(name): tuple(int(n) for n in shape) for name, shape in json.loads(text)}
    except (zlib.error, ValueError, TypeError, RecursionError) as error:
        raise WireFormatError(f"the schema section cannot be read ({error}).") from None
    if any(len(shape) > 32 or min(shape, default=0) < 0 for shape in shapes.values()):
        raise WireFormatError("the schema section holds an impossible shape.")
    return shapes


def _seal(grid: int, flags: int, arrays: NamedArrays, count: int, schema: bytes, body: list[bytes]) -> bytes:
    if count >= 2**32:
        raise CodecError(f"a frame carries at most {2**32 - 1} values, got {count}. Split the arrays.")
    head = _HEADER.pack(MAGIC, VERSION, grid, flags, schema_digest(arrays), count, len(schema), 0)[:-4]
    payload = b"".join([schema, *body])
    return head + struct.pack("<I", _checksum(head, payload)) + payload


def _checksum(head: bytes, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(head))
