"""Snapshots: dense frames that bring names and shapes along, for a receiver that has nothing yet."""

from __future__ import annotations

import json
import math
import zlib
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays
from fedkit.codec.frame import HEADER_SIZE, read_header, seal
from fedkit.codec.wire import Codec, decode
from fedkit.errors import CodecError, WireFormatError

MAX_SCHEMA_BYTES: Final = 2**20  # names and shapes, as JSON
MAX_VALUES_PER_BYTE: Final = 4096  # of a whole snapshot; fewer than a real one has
LOSSLESS: Final = Codec()


def encode_snapshot(
    arrays: NamedArrays, codec: Codec = LOSSLESS, *, rng: np.random.Generator | None = None
) -> bytes:
    """Return a frame that brings its names and shapes along: dense float32, unless `codec` says otherwise.

    Raises
    ------
    CodecError
        If an entry is NaN or infinite.
    """
    frame = codec.encode(arrays, rng=rng)
    text = json.dumps([[name, array.shape] for name, array in arrays.items()], separators=(",", ":"))
    if len(text) > MAX_SCHEMA_BYTES:
        raise CodecError(f"names and shapes take {len(text)} bytes: expected at most {MAX_SCHEMA_BYTES}.")
    header = read_header(frame)
    body, schema = frame[HEADER_SIZE:], zlib.compress(text.encode(), 9)
    return seal(header.grid, header.flags, arrays, header.count, [body], schema)


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
    shapes = _read_schema(data[HEADER_SIZE : HEADER_SIZE + header.schema_size])
    size = sum(math.prod(shape) for shape in shapes.values())
    if size < header.count or size > MAX_VALUES_PER_BYTE * len(data):  # before anything of that size is made
        raise WireFormatError(f"the names and shapes call for {size} values, which cannot be in this frame.")
    return decode(data, like={name: np.broadcast_to(np.float32(0), shape) for name, shape in shapes.items()})


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
