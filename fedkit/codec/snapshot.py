"""Snapshots: dense frames that include names and shapes, for a receiver that has nothing yet."""

from __future__ import annotations

import json
import math
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays, num_values
from fedkit.codec.frame import HEADER_SIZE, read_header, seal
from fedkit.codec.sections import MASK_DRAWN
from fedkit.codec.wire import Codec, decode
from fedkit.errors import WireFormatError

MAX_SCHEMA_BYTES: Final = 2**20  # names and shapes, as JSON; for a small snapshot, 2**16 plus its own size
MAX_BRACKETS: Final = 2048  # in that JSON, two for an array, and one for each 128 bytes of the snapshot
MAX_VALUES_PER_BYTE: Final = 4096  # of a whole snapshot; fewer than a real one has
LOSSLESS: Final = Codec()


def encode_snapshot(
    arrays: NamedArrays, codec: Codec = LOSSLESS, *, rng: np.random.Generator | None = None
) -> bytes:
    """Return a frame that includes its names and shapes: dense float32, unless `codec` says otherwise.

    Raises
    ------
    CodecError
        If an entry is NaN or infinite, or the names and shapes take more than a receiver accepts.
    """
    frame = codec.encode(arrays, rng=rng)
    if num_values(arrays) > MAX_VALUES_PER_BYTE * len(frame):  # almost all zeros
        frame = LOSSLESS.encode(arrays)
    text = json.dumps([[name, array.shape] for name, array in arrays.items()], separators=(",", ":"))
    header = read_header(frame)
    body, schema = frame[HEADER_SIZE:], zlib.compress(text.encode(), 9)
    sealed = seal(header.grid, header.flags, arrays, header.count, [body], schema)
    _read_schema(schema, len(sealed))  # raises if a receiver would refuse it
    return sealed


def decode_snapshot(data: bytes) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of a snapshot; inverse of `encode_snapshot`.

    Raises
    ------
    CodecError
        For bytes that are damaged, of another version, or not a snapshot.
    """
    header = read_header(data)
    if not header.schema_size:
        raise WireFormatError("expected a snapshot, got a frame without names and shapes.")
    if header.flags & MASK_DRAWN:  # its 16 bytes could claim any number of entries
        raise WireFormatError("the mask of a snapshot is not drawn.")
    shapes = _read_schema(data[HEADER_SIZE : HEADER_SIZE + header.schema_size], len(data))
    size = sum(math.prod(max(n, 1) for n in shape) for shape in shapes.values())  # numpy also rejects (0, 2**64)
    if size < header.count or size > MAX_VALUES_PER_BYTE * len(data):  # before anything of that size is allocated
        raise WireFormatError(f"the names and shapes call for {size} values, which cannot be in this frame.")
    return decode(data, like={name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()})


def _read_schema(section: bytes, size: int) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of a snapshot of `size` bytes; limits are checked before any large allocation."""
    unpack = zlib.decompressobj()
    try:
        text = unpack.decompress(section, min(MAX_SCHEMA_BYTES, 2**16 + size))
        if not unpack.eof or text.count(b"[") > MAX_BRACKETS + size // 128:
            raise ValueError("cut short, or names and shapes of too many arrays for so few values")
        shapes = {str(name): tuple(int(n) for n in shape) for name, shape in json.loads(text)}
    except (zlib.error, ValueError, TypeError, OverflowError, RecursionError) as error:
        raise WireFormatError(f"the schema section cannot be read ({error}).") from None
    if any(len(shape) > 32 or min(shape, default=0) < 0 for shape in shapes.values()):
        raise WireFormatError("the schema section holds an impossible shape.")
    return shapes
