"""Levels ⇄ about their entropy in bytes.

The coder is the ANS stack of the library `constriction`: it reaches the order-0 entropy to within 0.1 %
(`python -m benchmarks.codec` compares it with others). What is ours is what goes around it: which arrays share a
table of frequencies, tables of one byte per level, and the grouping of small levels into one symbol, which makes
the coder several times faster.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import constriction
import numpy as np
from numpy.typing import NDArray

from fedkit.codec.packing import Levels, pack_levels, packed_size, unpack_levels
from fedkit.errors import WireFormatError

AnsCoder = constriction.stream.stack.AnsCoder
Categorical = constriction.stream.model.Categorical

ABSENT: Final = 255  # in a table: this level does not occur
COSTS: Final = np.array([round(2 ** (24 - byte / 16)) for byte in range(ABSENT)] + [0], np.float64)
"""What a byte of a table means: the frequency of a level, from 2**24 down by sixteenths of a bit."""

_MAX_SYMBOLS: Final = 256  # of one table
_TABLE = struct.Struct("<BB")  # first level, number of levels − 1
_TABLE_BITS: Final = 8 * _TABLE.size
_SAMPLE: Final = 2**20  # levels counted to make tables
_CHUNK: Final = 2**8 * 120  # levels coded at a time: whole symbols, of however many levels


def encode_levels(parts: Sequence[Levels]) -> bytes:
    """Return the levels of all parts, coded to about their entropy.

    A part has a table of its own where that pays, and shares one with all others where it does not. Of levels
    with many values the low bits, which hardly compress, travel as they are.
    """
    counts, shift = _histograms(parts)
    owners = _owners(counts)
    tables = [_make_table(counts[~owners].sum(axis=0)), *map(_make_table, counts[owners])]
    low = [(part & np.uint16((1 << shift) - 1)).astype(np.uint16) for part in parts] if shift else []
    coder = AnsCoder()
    for part, table in reversed(list(zip(parts, _table_of_part(tables, owners), strict=True))):
        table.push(coder, part >> np.uint16(shift) if shift else part)
    head = bytes([shift]) + np.packbits(owners, bitorder="little").tobytes()
    fields = pack_levels(np.concatenate(low), shift) if shift else b""
    stream = coder.get_compressed().astype("<u4").tobytes()
    return b"".join([head, *(table.to_bytes() for table in tables), fields, stream])


def decode_levels(data: memoryview, sizes: Sequence[int]) -> list[NDArray[np.uint16]]:
    """Return parts of `sizes` levels each; inverse of `encode_levels`.

    Raises
    ------
    WireFormatError
        If `data` cannot be what `encode_levels` made of parts of these sizes.
    """
    bitmap = -(-len(sizes) // 8)
    if len(data) < 1 + bitmap or data[0] > 8:
        raise WireFormatError("coded levels: the section is cut short, or its shift is above 8.")
    shift, total = data[0], sum(sizes)
    owners = np.unpackbits(np.frombuffer(data[1 : 1 + bitmap], np.uint8), bitorder="little")
    if owners[len(sizes) :].any():
        raise WireFormatError("coded levels: the padding bits are not zero.")
    owners, data = owners[: len(sizes)].astype(np.bool_), data[1 + bitmap :]
    tables = []
    for _ in range(1 + int(owners.sum())):
        table, data = _Table.read(data)
        tables.append(table)
    low = unpack_levels(data[: packed_size(total, shift)], total, shift)
    data = data[packed_size(total, shift) :]
    if len(data) > 4 * total + 8:  # no symbol takes more than 24 bits
        raise WireFormatError(f"coded levels: {len(data)} bytes are too many for {total} levels.")
    if len(data) % 4:
        raise WireFormatError("coded levels: expected whole words of 4 bytes.")
    words = np.frombuffer(data, "<u4").astype(np.uint32)
    if words.size and not words[-1]:
        raise WireFormatError("coded levels: the stream ends in a zero word.")
    coder, start, parts = AnsCoder(words), 0, []
    for size, table in zip(sizes, _table_of_part(tables, owners), strict=True):
        part = table.pop(coder, size)
        parts.append((part << np.uint16(shift)) | low[start : start + size] if shift else part)
        start += size
    if not coder.is_empty():
        raise WireFormatError("coded levels: the stream holds more than was expected.")
    return parts


def order0_bits(levels: Levels) -> float:
    """Return the order-0 entropy of all levels together, in bits: what an ideal coder of single levels needs.

    >>> order0_bits(np.array([0, 1, 1, 0], np.uint16))
    4.0
    """
    counts = np.bincount(levels)
    counts = counts[counts > 0]
    return float(levels.size * np.log2(levels.size or 1) - (counts * np.log2(counts)).sum())


class _Table(NamedTuple):
    """Frequencies of the levels from `first` on, each as a byte that stands for an entry of `COSTS`."""

    first: int
    costs: NDArray[np.uint8]

    def to_bytes(self) -> bytes:
        return _TABLE.pack(self.first, self.costs.size - 1) + self.costs.tobytes()

    @classmethod
    def read(cls, data: memoryview) -> tuple[_Table, memoryview]:
        if len(data) < _TABLE.size or len(data) < _TABLE.size + data[1] + 1:
            raise WireFormatError("coded levels: a table is cut short.")
        end = _TABLE.size + data[1] + 1
        table = cls(data[0], np.frombuffer(data[_TABLE.size : end], np.uint8))
        if (table.costs == ABSENT).all() or table.first + table.costs.size > _MAX_SYMBOLS:
            raise WireFormatError("coded levels: a table is empty, or reaches beyond 255.")
        return table, data[end:]

    def symbols(self) -> NDArray[np.uint8]:
        """Return, for each symbol of the coder, the levels it stands for, shape (symbols, grouped levels)."""
        present = np.flatnonzero(self.costs != ABSENT).astype(np.uint8)
        group = next(g for g in (8, 5, 4, 3, 2, 1) if present.size**g <= _MAX_SYMBOLS)
        digits = np.indices((present.size,) * group, np.uint8).reshape(group, -1).T
        return present[digits] + np.uint8(self.first)

    def model(self, symbols: NDArray[np.uint8]) -> Categorical:
        odds = COSTS[self.costs[symbols - np.uint8(self.first)]]
        weights = odds[:, 0]
        for column in odds.T[1:]:  # in this order on every machine
            weights = weights * column
        return Categorical(weights / weights.max(), perfect=False)

    def push(self, coder: AnsCoder, levels: Levels) -> None:
        symbols = self.symbols()
        if len(symbols) == 1 or not levels.size:
            return
        rank = np.zeros(_MAX_SYMBOLS, np.uint8)
        present = np.flatnonzero(self.costs != ABSENT)
        rank[present + self.first] = np.arange(present.size)
        group, model = symbols.shape[1], self.model(symbols)
        for start in reversed(range(0, levels.size, _CHUNK)):
            ranks = rank[levels[start : start + _CHUNK]]
            padded = np.full(-(-ranks.size // group) * group, self.costs[present].argmin(), np.uint8)
            padded[: ranks.size] = ranks
            joined = padded[::group].copy()
            for digit in range(1, group):
                joined *= np.uint8(present.size)
                joined += padded[digit::group]
            coder.encode_reverse(joined.astype(np.int32), model)

    def pop(self, coder: AnsCoder, size: int) -> NDArray[np.uint16]:
        symbols = self.symbols()
        if len(symbols) == 1 or not size:
            return np.full(size, symbols[0, 0], np.uint16)
        group, model = symbols.shape[1], self.model(symbols)
        levels = np.empty((-(-size // group), group), np.uint16)
        for start in range(0, len(levels), _CHUNK // group):
            part = levels[start : start + _CHUNK // group]
            part[:] = symbols[coder.decode(model, len(part))]
        return levels.ravel()[:size]


def _make_table(counts: NDArray[np.int64]) -> _Table:
    """Return the table of levels that occur `counts` times; of nothing, a table of level 0 alone."""
    (present,) = np.nonzero(counts)
    if not present.size:
        return _Table(0, np.zeros(1, np.uint8))
    first, last = int(present[0]), int(present[-1])
    return _Table(first, _costs(counts[first : last + 1]))


def _costs(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the byte nearest to −16 log2 of each frequency, relative to the largest."""
    with np.errstate(divide="ignore"):
        exact = 16 * np.log2(counts.max(axis=-1, keepdims=True) / counts)
    return np.where(counts > 0, np.minimum(np.rint(exact), ABSENT - 1), ABSENT).astype(np.uint8)


def _histograms(parts: Sequence[Levels]) -> tuple[NDArray[np.int64], int]:
    """Return how often each level occurs in each part, shape (parts, levels), and how many low bits were cut off.

    Of a large part a sample is counted; a level between the least and the largest then counts at least once.
    """
    top = max((int(part.max()) for part in parts if part.size), default=0)
    shift = max(0, top.bit_length() - 8)
    counts = np.zeros((len(parts), (top >> shift) + 1), np.int64)
    for row, part in zip(counts, parts, strict=True):
        for chunk in _sample(part):
            row += np.bincount(chunk >> np.uint16(shift), minlength=row.size)
        if part.size > _SAMPLE:
            row[int(part.min()) >> shift : (int(part.max()) >> shift) + 1] += 1
    while shift < 8 and counts.shape[1] > 2:  # more low bits, as long as that saves more in tables than it costs
        coarse = np.pad(counts, ((0, 0), (0, counts.shape[1] % 2))).reshape(len(parts), -1, 2).sum(axis=2)
        if shift == 0 or _bits(coarse).sum() + counts.sum() >= _bits(counts).sum():
            break
        counts, shift = coarse, shift + 1
    return counts, shift


def _sample(part: Levels) -> Iterator[Levels]:
    step = max(1, part.size // _SAMPLE)
    for start in range(0, part.size, step * 2**12):
        yield part[start : start + 2**12]


def _bits(counts: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return what each row of counts takes with a table of its own, in bits."""
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.ones(counts.shape), where=(counts > 0) & (total > 0))
    return -(counts * np.log2(share)).sum(axis=1) + _TABLE_BITS + 8 * (counts > 0).sum(axis=1)


def _owners(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which parts save more by a table of their own than it takes."""
    everything = counts.sum(axis=0)
    if len(counts) < 2 or not everything.any():
        return np.zeros(len(counts), np.bool_)
    shared = -np.log2(np.maximum(everything, 1) / everything.sum())
    return (counts * shared).sum(axis=1) > _bits(counts)


def _table_of_part(tables: Sequence[_Table], owners: NDArray[np.bool_]) -> Iterator[_Table]:
    own = iter(tables[1:])
    for owner in owners:
        yield next(own) if owner else tables[0]
