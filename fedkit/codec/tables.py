"""Frequency tables, one byte per level; and the joining of several small levels into one symbol.

A coder takes a fixed time per symbol, so joining several levels into a symbol makes it several times faster, at no
loss: the frequency of a symbol is the product of those of its levels.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedkit.codec.packing import Levels
from fedkit.errors import WireFormatError

ABSENT: Final = 255  # in a table: this level does not occur
COSTS: Final = np.array([round(2 ** (24 - byte / 16)) for byte in range(ABSENT)] + [0], np.float64)
"""What a byte of a table means: the frequency of a level, from 2**24 down by sixteenths of a bit."""

MAX_SYMBOLS: Final = 256  # of one table
CHUNK: Final = 2**8 * 120  # levels joined at a time; a multiple of every number of levels per symbol
_HEAD = struct.Struct("<BB")  # first level, number of levels − 1
HEAD_BITS: Final = 8 * _HEAD.size


class Table(NamedTuple):
    """Frequencies of the levels from `first` on, each as a byte that stands for an entry of `COSTS`."""

    first: int
    costs: NDArray[np.uint8]

    def to_bytes(self) -> bytes:
        """Return the table as it is sent."""
        return _HEAD.pack(self.first, self.costs.size - 1) + self.costs.tobytes()

    @classmethod
    def read(cls, data: memoryview) -> tuple[Table, memoryview]:
        """Return the table that `data` begins with, and what follows; raises WireFormatError."""
        if len(data) < _HEAD.size or len(data) < _HEAD.size + data[1] + 1:
            raise WireFormatError("coded levels: a table is cut short.")
        end = _HEAD.size + data[1] + 1
        table = cls(data[0], np.frombuffer(data[_HEAD.size : end], np.uint8))
        if (table.costs == ABSENT).all() or table.first + table.costs.size > MAX_SYMBOLS:
            raise WireFormatError("coded levels: a table is empty, or reaches beyond 255.")
        return table, data[end:]

    def symbols(self) -> NDArray[np.uint8]:
        """Return, for each symbol of the coder, the levels it stands for, shape (symbols, joined levels)."""
        present = np.flatnonzero(self.costs != ABSENT).astype(np.uint8)
        return present[_digits(present.size)] + np.uint8(self.first)

    def odds(self) -> NDArray[np.float64]:
        """Return the frequency of each symbol: the product of those of its levels, relative to the largest."""
        odds = COSTS[self.costs[self.symbols() - np.uint8(self.first)]]
        weights = odds[:, 0]
        for column in odds.T[1:]:  # in this order on every machine
            weights = weights * column
        return np.asarray(weights / weights.max(), np.float64)

    def join(self, levels: Levels) -> NDArray[np.uint8]:
        """Return levels as symbols of the coder; the last one is padded with the most frequent level."""
        present, group = np.flatnonzero(self.costs != ABSENT), self.symbols().shape[1]
        rank = np.zeros(MAX_SYMBOLS, np.uint8)
        rank[present + self.first] = np.arange(present.size)
        joined = np.empty(-(-levels.size // group), np.uint8)
        for start in range(0, levels.size, CHUNK):
            ranks = rank[levels[start : start + CHUNK]]
            if ranks.size % group:
                filling = np.full(-ranks.size % group, self.costs[present].argmin(), np.uint8)
                ranks = np.concatenate([ranks, filling])
            part = joined[start // group : start // group + ranks.size // group]
            part[:] = ranks[::group]
            for digit in range(1, group):
                part *= np.uint8(present.size)
                part += ranks[digit::group]
        return joined

    def separate(self, joined: Iterable[NDArray[np.integer]], size: int) -> NDArray[np.uint16]:
        """Return `size` levels, given chunks of symbols; inverse of `join`. Raises WireFormatError."""
        symbols, start = self.symbols().astype(np.uint16), 0
        levels = np.empty((self.num_symbols(size), symbols.shape[1]), np.uint16)
        for part in joined:
            if part.size and int(part.max()) >= len(symbols):
                raise WireFormatError(f"coded levels: a symbol lies above {len(symbols) - 1}.")
            np.take(symbols, part, axis=0, out=levels[start : start + part.size], mode="clip")
            start += part.size
        return levels.ravel()[:size]

    def num_symbols(self, size: int) -> int:
        """Return how many symbols `size` levels are joined into."""
        return -(-size // int(self.symbols().shape[1]))


def make_table(counts: NDArray[np.int64]) -> Table:
    """Return the table of levels that occur `counts` times; if none does, a table of level 0 alone."""
    (present,) = np.nonzero(counts)
    if not present.size:
        return Table(0, np.zeros(1, np.uint8))
    first, last = int(present[0]), int(present[-1])
    return Table(first, _costs(counts[first : last + 1]))


def _costs(counts: NDArray[np.int64]) -> NDArray[np.uint8]:
    """Return the byte nearest to −16 log2 of each frequency, relative to the largest."""
    with np.errstate(divide="ignore"):
        exact = 16 * np.log2(counts.max(axis=-1, keepdims=True) / counts)
    return np.where(counts > 0, np.minimum(np.rint(exact), ABSENT - 1), ABSENT).astype(np.uint8)


@cache
def _digits(base: int) -> NDArray[np.uint8]:
    """Return all numbers with as many digits as fit in a symbol, one per row; at most 8 digits."""
    count = next(n for n in (8, 5, 4, 3, 2, 1) if base**n <= MAX_SYMBOLS)
    return np.ascontiguousarray(np.indices((base,) * count, np.uint8).reshape(count, -1).T)
