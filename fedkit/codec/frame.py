"""The fixed part of a frame: header and checksum, the same for every kind. `WIRE.md` is the specification."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from fedkit.arrays import NamedArrays, schema_digest
from fedkit.codec.sections import CODED, MASK_CODED, MASK_DELTA, MASK_DRAWN, MASKED, PER_ARRAY
from fedkit.errors import CodecError, UnsupportedVersionError, WireFormatError

VERSION: Final = 1
MAGIC: Final = b"fk"
HEADER_SIZE: Final = 25

_HEADER = struct.Struct("<2sBBB8sIII")  # magic, version, grid, flags, schema digest, count, schema size, checksum
_FLAGS = (PER_ARRAY, MASKED, CODED, MASK_CODED, MASK_DELTA, MASK_DRAWN)
_MASK_KINDS: Final = MASK_CODED | MASK_DELTA | MASK_DRAWN


@dataclass(frozen=True, slots=True)
class Header:
    """The fixed fields of a frame, checksum verified."""

    grid: int  # 0: float32 values; else how levels map to values: `fedkit.codec.sections.GRIDS`
    flags: int
    digest: bytes  # of names and shapes, 8 bytes
    count: int  # values carried, over all arrays
    schema_size: int  # bytes of the schema section; 0 unless a snapshot


def read_header(data: bytes) -> Header:
    """Return the fixed fields of a frame after checking magic, version and checksum.

    Raises
    ------
    WireFormatError
        If these are not the bytes of an undamaged frame.
    UnsupportedVersionError
        If the frame is of another version.
    """
    if len(data) < HEADER_SIZE or data[:2] != MAGIC:
        raise WireFormatError("these bytes are not a fedkit frame.")
    if data[2] != VERSION:
        raise UnsupportedVersionError(f"frame version: expected {VERSION}, got {data[2]}. Update fedkit.")
    _, _, grid, flags, digest, count, schema_size, checksum = _HEADER.unpack_from(data)
    if checksum != _checksum(data[: HEADER_SIZE - 4], memoryview(data)[HEADER_SIZE:]):
        raise WireFormatError("the checksum does not match: the frame was damaged on its way.")
    if flags > sum(_FLAGS):
        raise WireFormatError(f"flags: expected 0 to {sum(_FLAGS)}, got {flags}. Was this sent by a newer fedkit?")
    kind = flags & _MASK_KINDS
    if kind not in (0, MASK_CODED, MASK_DELTA, MASK_DRAWN) or (kind and not flags & MASKED):
        raise WireFormatError(f"flags {flags}: a mask is a bitmap, coded, a change, or drawn, or there is none.")
    if schema_size > len(data) - HEADER_SIZE:
        raise WireFormatError(f"the frame is cut short: expected {schema_size} bytes of names and shapes.")
    return Header(grid, flags, digest, count, schema_size)


def seal(
    grid: int, flags: int, arrays: NamedArrays, count: int, body: Sequence[bytes], schema: bytes = b""
) -> bytes:
    """Return a frame of the given sections, with its header and checksum."""
    if count >= 2**32:
        raise CodecError(f"a frame carries at most {2**32 - 1} values, got {count}. Split the arrays.")
    head = _HEADER.pack(MAGIC, VERSION, grid, flags, schema_digest(arrays), count, len(schema), 0)[:-4]
    payload = b"".join([schema, *body])
    return head + struct.pack("<I", _checksum(head, payload)) + payload


def _checksum(head: bytes, body: bytes | memoryview) -> int:
    return zlib.crc32(body, zlib.crc32(head))
