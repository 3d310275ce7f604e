"""The sections of a frame's body: the mask, and the groups with their levels."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays, check_same_schema, flatten_mask, num_values, unflatten
from fedkit.codec.baselines import BlocksGroup
from fedkit.codec.entropy import decode_levels, encode_levels, order0_bits
from fedkit.codec.entropy_constrained import DesignedGroup
from fedkit.codec.packing import pack_levels, pack_mask, packed_size, unpack_levels, unpack_mask
from fedkit.codec.protocol import Group, Quantized
from fedkit.codec.quantize import MidRiseGroup, MidTreadGroup
from fedkit.codec.rotation import RotatedGroup
from fedkit.codec.signs import SignsGroup
from fedkit.codec.sparsify import DrawnMask
from fedkit.errors import SchemaMismatchError, WireFormatError

T = TypeVar("T", bound=np.generic)

FLOAT32: Final = 0  # the grid number of values that are not quantized
PER_ARRAY, MASKED, CODED, MASK_CODED, MASK_DELTA, MASK_DRAWN = 1, 2, 4, 8, 16, 32  # flags
GRIDS: Final[dict[int, type[Group]]] = {
    group.grid: group
    for group in (MidRiseGroup, MidTreadGroup, DesignedGroup, RotatedGroup, BlocksGroup, SignsGroup)
}
_WORTH: Final = 0.995  # of the packed size, below which coding is worth its time
_U32 = struct.Struct("<I")
_DRAWN = struct.Struct("<Qd")  # seed and density


class Reader:
    """Reads the sections of a body in order, and never beyond its end."""

    def __init__(self, body: memoryview) -> None:
        self._body = body

    def take(self, size: int) -> memoryview:
        """Return the next `size` bytes."""
        if size > len(self._body):
            raise WireFormatError(f"the frame is cut short: expected {size} more bytes, got {len(self._body)}.")
        taken, self._body = self._body[:size], self._body[size:]
        return taken

    def rest(self) -> memoryview:
        """Return all that is left."""
        return self.take(len(self._body))

    def end(self) -> None:
        """Check that nothing is left."""
        if len(self._body):
            raise WireFormatError(f"the frame has {len(self._body)} bytes too many.")


def split(flat: NDArray[T], sizes: Sequence[int]) -> list[NDArray[T]]:
    """Return `flat` cut into parts of `sizes` entries."""
    return [flat[end - size : end] for end, size in zip(accumulate(sizes), sizes, strict=True)]


# ---- mask --------------------------------------------------------------------------------------


def write_mask(mask: Mask | DrawnMask, last: Mask | None) -> tuple[int, bytes]:
    """Return flags and section of a mask: a bitmap, coded, or coded as a change of `last`, whichever is smallest.

    Of a drawn mask, the section has only the seed and the density.
    """
    if isinstance(mask, DrawnMask):
        return MASKED | MASK_DRAWN, _DRAWN.pack(mask.seed, mask.density)
    flat, sizes = flatten_mask(mask), [part.size for part in mask.values()]
    choices = [(MASKED, pack_mask(flat))]
    choices.append((MASKED | MASK_CODED, _coded(flat, sizes)))
    if last is not None:
        check_same_schema(last, like=mask)
        before = flatten_mask(last)
        choices.append((MASKED | MASK_DELTA, _U32.pack(_checksum(before)) + _coded(flat ^ before, sizes)))
    return min(choices, key=lambda choice: len(choice[1]))


def read_mask(body: Reader, flags: int, like: NamedArrays, last: Mask | None) -> dict[str, NDArray[np.bool_]]:
    """Return the mask; inverse of `write_mask`.

    Raises
    ------
    SchemaMismatchError
        If the section is a change of a mask other than `last`.
    WireFormatError
        If it is damaged.
    """
    total, sizes = num_values(like), [array.size for array in like.values()]
    if flags & MASK_DRAWN:
        seed, density = _DRAWN.unpack(body.take(_DRAWN.size))
        if not 0 < density <= 1:
            raise WireFormatError(f"the density of a mask: expected above 0 to 1, got {density}.")
        return DrawnMask(seed, density).mask(like)
    if flags & MASK_DELTA:
        before = None if last is None else flatten_mask(last)
        if before is None or before.size != total or _U32.pack(_checksum(before)) != body.take(_U32.size):
            raise SchemaMismatchError("the mask is a change of one that this side does not have.")
        return unflatten(_decoded(body, sizes) ^ before, like=like)
    if flags & MASK_CODED:
        return unflatten(_decoded(body, sizes), like=like)
    return unflatten(unpack_mask(body.take(packed_size(total, 1)), total), like=like)


def mask_bits(mask: Mask) -> float:
    """Return the order-0 entropy of a mask, in bits."""
    return order0_bits(flatten_mask(mask).astype(np.uint8))


def _coded(flat: NDArray[np.bool_], sizes: Sequence[int]) -> bytes:
    coded = encode_levels(split(flat.astype(np.uint8), sizes))
    return _U32.pack(len(coded)) + coded


def _decoded(body: Reader, sizes: Sequence[int]) -> NDArray[np.bool_]:
    (size,) = _U32.unpack(body.take(_U32.size))
    parts = decode_levels(body.take(size), sizes)
    flat = np.concatenate(parts) if parts else np.zeros(0, np.uint16)
    if (flat > 1).any():
        raise WireFormatError("a coded mask holds something else than 0 and 1.")
    return flat.astype(np.bool_)


def _checksum(flat: NDArray[np.bool_]) -> int:
    return zlib.crc32(pack_mask(flat))


# ---- values ------------------------------------------------------------------------------------


def write_groups(groups: Sequence[Quantized], sizes: Sequence[int]) -> tuple[int, list[bytes]]:
    """Return flags and sections of quantized groups, the levels packed or coded, whichever is smaller."""
    heads = [quantized.group.to_bytes() for quantized in groups]
    packed = sum(packed_size(levels.size, group.bits) for group, levels in groups)
    even = groups and isinstance(groups[0].group, SignsGroup)  # signs are equally frequent: nothing to gain
    coded = b"" if even or not packed else encode_levels(_parts(groups, sizes))
    if coded and len(coded) < _WORTH * packed:
        return CODED, [*heads, coded]
    return 0, [*heads, *(pack_levels(levels, group.bits) for group, levels in groups)]


def read_groups(body: Reader, grid: int, flags: int, sizes: Sequence[int]) -> list[Quantized]:
    """Return the groups; inverse of `write_groups`. Raises WireFormatError."""
    if grid not in GRIDS:
        raise WireFormatError(f"grid: expected 0 to {max(GRIDS)}, got {grid}. Was this sent by a newer fedkit?")
    owners = [[size] for size in sizes] if flags & PER_ARRAY else [sizes]
    heads = [GRIDS[grid].read(body.take, own) for own in owners]
    if not flags & CODED:
        return [
            Quantized(g, unpack_levels(body.take(packed_size(g.num_levels, g.bits)), g.num_levels, g.bits))
            for g in heads
        ]
    parts = decode_levels(body.rest(), _part_sizes(heads, sizes))
    if len(heads) == len(parts):
        return [Quantized(*pair) for pair in zip(heads, parts, strict=True)]
    return [Quantized(heads[0], np.concatenate(parts))]


def _part_sizes(heads: Sequence[Group], sizes: Sequence[int]) -> list[int]:
    """Return the number of levels of each part that may own a table: each array, if levels belong to arrays."""
    if len(heads) == 1 and heads[0].num_levels == sum(sizes):
        return list(sizes)
    return [head.num_levels for head in heads]


def _parts(groups: Sequence[Quantized], sizes: Sequence[int]) -> list[NDArray[np.uint16]]:
    if len(groups) == 1:
        return split(groups[0].levels, _part_sizes([groups[0].group], sizes))
    return [quantized.levels for quantized in groups]
