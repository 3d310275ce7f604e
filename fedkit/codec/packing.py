"""Levels and masks ⇄ whole bytes: true bit-packing, least significant bit first."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import WireFormatError

Levels: TypeAlias = NDArray[np.uint16] | NDArray[np.uint8]

_CHUNK: Final = 2**15  # levels unpacked at a time, at a byte per bit; fills whole bytes at any width


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes `count` levels of `bits` bits take: ceil(count · bits / 8).

    >>> packed_size(5, 3)
    2
    """
    return (count * bits + 7) // 8


def pack_levels(levels: Levels, bits: int) -> bytes:
    """Return levels below 2**bits as a stream of `bits`-wide fields, 0 to 16 bits each.

    >>> pack_levels(np.array([1, 2, 3], np.uint16), 2).hex()
    '39'
    """
    if bits == 8:
        return levels.astype(np.uint8).tobytes()
    if bits == 1:
        return np.packbits(levels.astype(np.bool_), bitorder="little").tobytes()
    chunks = []
    for start in range(0, levels.size, _CHUNK):
        fields = (levels[start : start + _CHUNK, None] >> np.arange(bits, dtype=np.uint16)) & 1
        chunks.append(np.packbits(fields.astype(np.uint8), bitorder="little").tobytes())
    return b"".join(chunks)


def unpack_levels(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.uint16]:
    """Return `count` levels; inverse of `pack_levels`.

    Raises
    ------
    WireFormatError
        If `data` is not exactly `packed_size(count, bits)` long, or its padding is not zero.
    """
    if len(data) != packed_size(count, bits):
        raise WireFormatError(f"levels: expected {packed_size(count, bits)} bytes, got {len(data)}.")
    raw = np.frombuffer(data, np.uint8)
    if bits == 8:
        return raw.astype(np.uint16)
    if bits == 0:
        return np.zeros(count, np.uint16)
    if count * bits % 8 and raw[-1] >> (count * bits % 8):
        raise WireFormatError("levels: the padding bits are not zero.")
    if bits == 1:
        return np.unpackbits(raw, count=count, bitorder="little").astype(np.uint16)
    levels = np.zeros(count, np.uint16)
    for start in range(0, count, _CHUNK):
        part = levels[start : start + _CHUNK]
        stream = np.unpackbits(raw[start * bits // 8 : (start + _CHUNK) * bits // 8], bitorder="little")
        for bit in range(bits):
            part |= stream[bit : part.size * bits : bits].astype(np.uint16) << bit
    return levels


def pack_mask(mask: NDArray[np.bool_]) -> bytes:
    """Return a flat mask as a bitmap of ceil(size / 8) bytes."""
    return np.packbits(mask, bitorder="little").tobytes()


def unpack_mask(data: bytes | memoryview, count: int) -> NDArray[np.bool_]:
    """Return a flat mask of `count` entries; inverse of `pack_mask`; raises as `unpack_levels`."""
    return unpack_levels(data, count, 1).astype(np.bool_)
