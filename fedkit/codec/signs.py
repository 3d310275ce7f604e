"""Signs of chosen blocks: below one bit per entry, the least error for values of almost equal size.

Local training with Adam moves every entry by about the learning rate, step after step. So the entries of an update
differ little in size, and saying which ones are large costs more than it gains. Instead, whole blocks of
consecutive entries are sent or not, those with the largest mean size first. Of the entries sent, only the sign is
sent, with one scale per array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fedkit.codec.protocol import Take, join
from fedkit.errors import WireFormatError

MIN_BLOCK: Final = 64  # entries
MAX_BLOCK: Final = 1024
_SOME: Final = 2**9  # blocks summed at a time
NUM_BLOCKS: Final = 128  # approximate number of blocks, if their size is between these two


class Blocks(NamedTuple):
    """How arrays are cut into blocks: consecutive entries, an array's last one shorter."""

    starts: NDArray[np.int64]  # of each block, in the joined values
    sizes: NDArray[np.int64]
    owner: NDArray[np.int64]  # the array that a block belongs to


@lru_cache(maxsize=64)
def blocks_of(sizes: tuple[int, ...]) -> Blocks:
    """Return the blocks of arrays of `sizes` entries: about 128 in all, of 64 to 1,024 entries."""
    block = min(max(-(-sum(sizes) // NUM_BLOCKS), MIN_BLOCK), MAX_BLOCK)
    counts = [-(-size // block) for size in sizes]
    owner = np.repeat(np.arange(len(sizes)), counts)
    within = np.concatenate([np.zeros(0, np.int64), *(block * np.arange(count) for count in counts)])
    ends = np.cumsum([0, *sizes])
    starts = within + ends[owner]
    return Blocks(starts, np.minimum(block, ends[owner + 1] - starts), owner)


@dataclass(frozen=True, slots=True)
class SignsGroup:
    """One bit for each entry of the blocks that are sent."""

    scales: NDArray[np.float32]  # one for each array, with the 16 leading bits of a float32; 0 if nothing is sent
    sent: NDArray[np.bool_]  # one for each block
    sizes: tuple[int, ...]  # of the arrays
    grid: ClassVar[int] = 6
    bits: ClassVar[int] = 1

    @property
    def num_levels(self) -> int:
        """One for each entry of a block that is sent."""
        return int(blocks_of(self.sizes).sizes[self.sent].sum())

    def to_bytes(self) -> bytes:
        """Return which blocks are sent, and the scales of their arrays."""
        scales = self.scales[np.unique(blocks_of(self.sizes).owner[self.sent])]
        return np.packbits(self.sent, bitorder="little").tobytes() + _leading(scales).astype("<u2").tobytes()

    @classmethod
    def read(cls, take: Take, sizes: Sequence[int]) -> Self:
        """Return the group; inverse of `to_bytes`."""
        owner = blocks_of(tuple(sizes)).owner
        bits = np.unpackbits(np.frombuffer(take(-(-owner.size // 8)), np.uint8), bitorder="little")
        if bits[owner.size :].any():
            raise WireFormatError("signs: the padding bits are not zero.")
        sent = bits[: owner.size].astype(np.bool_)
        owners, scales = np.unique(owner[sent]), np.zeros(len(sizes), np.float32)
        raw = np.frombuffer(take(2 * owners.size), "<u2").astype(np.uint32)
        scales[owners] = (raw << np.uint32(16)).view(np.float32)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise WireFormatError("signs: a scale is negative or not finite.")
        return cls(scales, sent, tuple(sizes))

    def dequantize(self, levels: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return plus or minus the array's scale; entries of blocks that were not sent are zero."""
        if levels.size and int(levels.max()) > 1:
            raise WireFormatError("signs: a level is neither 0 nor 1.")
        starts = blocks_of(self.sizes).starts
        values, taken = np.empty(sum(self.sizes), np.float32), 0
        turns = np.flatnonzero(np.diff(self.sent, prepend=False, append=False))  # from not sent to sent and back
        edges = np.append(starts, values.size)[turns]
        for start, end in edges.reshape(-1, 2).tolist():
            values[start:end] = levels[taken : taken + end - start]
            taken += end - start
        for start, end in np.concatenate([[0], edges, [values.size]]).reshape(-1, 2).tolist():
            values[start:end] = 0.5  # between the two signs: nothing
        values *= 2
        values -= 1
        end = 0
        for size, scale in zip(self.sizes, self.scales, strict=True):
            values[end : end + size] *= scale
            end += size
        return values

    def times_two_to(self, power: int) -> Self:
        """Return the group of the same values times ``2**power``."""
        return replace(self, scales=np.ldexp(self.scales, power))


def signs_error(parts: Sequence[NDArray[np.float32]], rate: float) -> float:
    """Return the share of the energy that is lost if signs are sent at `rate` bits per value."""
    energy = sum(float(np.square(part, dtype=np.float64).sum()) for part in parts)
    blocks, totals, sent = _choose(parts, rate)
    entries, sums = _by_array(blocks, totals, sent, len(parts))
    kept = float((sums[entries > 0] ** 2 / entries[entries > 0]).sum())
    return 1 - kept / energy if energy else 0.0


def send_signs(parts: Sequence[NDArray[np.float32]], rate: float) -> tuple[SignsGroup, NDArray[np.uint16]]:
    """Return the signs of the best blocks at `rate` bits per value, scaled by their mean size in each array."""
    blocks, totals, sent = _choose(parts, rate)
    entries, sums = _by_array(blocks, totals, sent, len(parts))
    means = np.divide(sums, entries, out=np.zeros(len(parts)), where=entries > 0).astype(np.float32)
    scales = (_leading(means).astype(np.uint32) << np.uint32(16)).view(np.float32)
    signs = join(parts) >= 0
    kept = signs if sent.all() else signs[np.repeat(sent, blocks.sizes)]
    return SignsGroup(scales, sent, tuple(part.size for part in parts)), kept.astype(np.uint16)


def _choose(
    parts: Sequence[NDArray[np.float32]], rate: float
) -> tuple[Blocks, NDArray[np.float64], NDArray[np.bool_]]:
    """Return the blocks, the sum of each one's sizes, and which are sent: those of the largest mean."""
    blocks, flat = blocks_of(tuple(part.size for part in parts)), join(parts)
    totals, ends = np.zeros(blocks.starts.size), np.append(blocks.starts, flat.size)
    for first in range(0, totals.size, _SOME):
        some = ends[first : first + _SOME + 1]
        sums = np.add.reduceat(np.abs(flat[some[0] : some[-1]]), some[:-1] - some[0])
        totals[first : first + _SOME] = sums
    order = np.argsort(-totals / blocks.sizes, kind="stable")
    left = rate * flat.size - blocks.sizes.size - 16 * np.minimum(len(parts), np.arange(1, order.size + 1))
    sent = np.zeros(order.size, np.bool_)
    sent[order[np.cumsum(blocks.sizes[order]) - blocks.sizes[order] // 2 <= left]] = True
    return blocks, totals, sent & (totals > 0)


def _by_array(
    blocks: Blocks, totals: NDArray[np.float64], sent: NDArray[np.bool_], arrays: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return, for each array, how many entries are sent, and the sum of their sizes."""
    owner = blocks.owner[sent]
    counts, sums = np.bincount(owner, blocks.sizes[sent], arrays), np.bincount(owner, totals[sent], arrays)
    return counts.astype(np.float64), sums.astype(np.float64)


def _leading(numbers: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Return the 16 leading bits of each float32, rounded down."""
    return (numbers.view(np.uint32) >> np.uint32(16)).astype(np.uint16)
