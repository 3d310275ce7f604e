"""Entropy coding: levels ⇄ bytes, about as many as their entropy.

The coder is the ANS stack of the library `constriction`, which reaches the order-0 entropy to within 0.1 %. For
very many levels it may be the Huffman coder of zlib instead: 1 to 2 % larger, several times faster to decode, with
tables that a small frame could not afford (`python -m benchmarks.codec` compares them with others). Our own part
is what surrounds them: which arrays share a frequency table, and `fedkit.codec.tables`.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from typing import Final

import constriction
import numpy as np
from numpy.typing import NDArray

from fedkit.codec.packing import Levels, pack_levels, packed_size, unpack_levels
from fedkit.codec.tables import CHUNK, HEAD_BITS, Table, make_table
from fedkit.errors import WireFormatError

MANY: Final = 2**20  # levels, from which zlib is tried
_WORSE: Final = 1.03  # how many times larger than with ANS its result may be
_ZLIB: Final = 128  # flag in the first byte, beside the shift
_SAMPLE: Final = 2**20  # levels counted to make tables


def encode_levels(parts: Sequence[Levels]) -> bytes:
    """Return the levels of all parts, coded to about their entropy.

    A part has a table of its own where that saves bytes; all other parts share one. If levels take many values,
    their low bits, which hardly compress, are sent uncoded.
    """
    counts, shift = _histograms(parts)
    owners = _owners(counts)
    tables = [make_table(counts[~owners].sum(axis=0)), *map(make_table, counts[owners])]
    low = [(part & np.uint16((1 << shift) - 1)).astype(np.uint16) for part in parts] if shift else []
    of_part = list(_table_of_part(tables, owners))
    joined = [t.join(p >> np.uint16(shift) if shift else p) for t, p in zip(of_part, parts, strict=True)]
    stream, coder = _push_ans(of_part, joined), 0
    if sum(part.size for part in parts) >= MANY:
        fast = _deflate(joined)
        stream, coder = (fast, _ZLIB) if len(fast) <= _WORSE * len(stream) else (stream, 0)
    head = bytes([shift | coder]) + np.packbits(owners, bitorder="little").tobytes()
    fields = pack_levels(np.concatenate(low), shift) if shift else b""
    return b"".join([head, *(table.to_bytes() for table in tables), fields, stream])


def decode_levels(data: memoryview, sizes: Sequence[int]) -> list[NDArray[np.uint16]]:
    """Return parts of `sizes` levels each; inverse of `encode_levels`.

    Raises
    ------
    WireFormatError
        If `data` cannot be what `encode_levels` made of parts of these sizes.
    """
    bitmap = -(-len(sizes) // 8)
    if len(data) < 1 + bitmap or data[0] & ~_ZLIB > 8:
        raise WireFormatError("coded levels: the section is cut short, or its shift is above 8.")
    shift, total = data[0] & ~_ZLIB, sum(sizes)
    pop = _inflate if data[0] & _ZLIB else _pop_ans
    owners = np.unpackbits(np.frombuffer(data[1 : 1 + bitmap], np.uint8), bitorder="little")
    if owners[len(sizes) :].any():
        raise WireFormatError("coded levels: the padding bits are not zero.")
    owns, data = owners[: len(sizes)].astype(np.bool_), data[1 + bitmap :]
    tables = []
    for _ in range(1 + int(owns.sum())):
        table, data = Table.read(data)
        tables.append(table)
    low = unpack_levels(data[: packed_size(total, shift)], total, shift)
    parts = pop(data[packed_size(total, shift) :], list(_table_of_part(tables, owns)), sizes)
    if not shift:
        return parts
    ends = np.cumsum(sizes)
    return [(p << np.uint16(shift)) | low[end - p.size : end] for p, end in zip(parts, ends, strict=True)]


def order0_bits(levels: Levels) -> float:
    """Return the order-0 entropy of all levels together, in bits: what an ideal coder of single levels needs.

    >>> order0_bits(np.array([0, 1, 1, 0], np.uint16))
    4.0
    """
    if levels.size and int(levels.max()) <= 1:  # signs and masks, much faster
        ones = int(np.count_nonzero(levels))
        counts = np.array([levels.size - ones, ones])
    else:
        counts = np.bincount(levels)
    counts = counts[counts > 0]
    return float(levels.size * np.log2(levels.size or 1) - (counts * np.log2(counts)).sum())


def _push_ans(tables: Sequence[Table], joined: Sequence[NDArray[np.uint8]]) -> bytes:
    coder = constriction.stream.stack.AnsCoder()
    for table, symbols in reversed(list(zip(tables, joined, strict=True))):
        if symbols.size and len(odds := table.odds()) > 1:
            model = constriction.stream.model.Categorical(odds, perfect=False)
            for start in reversed(range(0, symbols.size, CHUNK)):
                coder.encode_reverse(symbols[start : start + CHUNK].astype(np.int32), model)
    return bytes(coder.get_compressed().astype("<u4").tobytes())


def _pop_ans(data: memoryview, tables: Sequence[Table], sizes: Sequence[int]) -> list[NDArray[np.uint16]]:
    if len(data) > 4 * sum(sizes) + 8:  # no symbol takes more than 24 bits
        raise WireFormatError(f"coded levels: {len(data)} bytes are too many for {sum(sizes)} levels.")
    if len(data) % 4:
        raise WireFormatError("coded levels: expected whole words of 4 bytes.")
    words = np.frombuffer(data, "<u4").astype(np.uint32)
    if words.size and not words[-1]:
        raise WireFormatError("coded levels: the stream ends in a zero word.")
    coder, parts = constriction.stream.stack.AnsCoder(words), []
    for table, size in zip(tables, sizes, strict=True):
        parts.append(table.separate(_popped(coder, table.odds(), table.num_symbols(size)), size))
    if not coder.is_empty():
        raise WireFormatError("coded levels: the stream holds more than was expected.")
    return parts


def _popped(
    coder: constriction.stream.stack.AnsCoder, odds: NDArray[np.float64], count: int
) -> Iterator[NDArray[np.int32]]:
    """Yield `count` symbols, chunk by chunk; for a table of one symbol, nothing was written."""
    model = constriction.stream.model.Categorical(odds, perfect=False) if count and len(odds) > 1 else None
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        yield np.zeros(size, np.int32) if model is None else coder.decode(model, size)


def _chunks(symbols: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    return (symbols[start : start + CHUNK] for start in range(0, symbols.size, CHUNK))


def _deflate(joined: Sequence[NDArray[np.uint8]]) -> bytes:
    coder = zlib.compressobj(1, zlib.DEFLATED, -zlib.MAX_WBITS, zlib.DEF_MEM_LEVEL + 1, zlib.Z_HUFFMAN_ONLY)
    return b"".join([*(coder.compress(symbols.data) for symbols in joined), coder.flush()])


def _inflate(data: memoryview, tables: Sequence[Table], sizes: Sequence[int]) -> list[NDArray[np.uint16]]:
    counts = [table.num_symbols(size) for table, size in zip(tables, sizes, strict=True)]
    coder = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        symbols = np.frombuffer(coder.decompress(data, sum(counts) + 1), np.uint8)
    except zlib.error as error:
        raise WireFormatError(f"coded levels: {error}.") from None
    if symbols.size != sum(counts) or not coder.eof or coder.unused_data:
        raise WireFormatError(f"coded levels: expected {sum(counts)} symbols and no more.")
    ends = np.cumsum(counts)
    joined = [symbols[end - count : end] for end, count in zip(ends, counts, strict=True)]
    return [table.separate(_chunks(part), size) for table, part, size in zip(tables, joined, sizes, strict=True)]


def _histograms(parts: Sequence[Levels]) -> tuple[NDArray[np.int64], int]:
    """Return how often each level occurs in each part, shape (parts, levels), and how many low bits were cut off.

    Of a large part, only a sample is counted; each level from its least to its largest then counts at least once.
    """
    top = max((int(part.max()) for part in parts if part.size), default=0)
    shift = max(0, top.bit_length() - 8)
    counts = np.zeros((len(parts), (top >> shift) + 1), np.int64)
    for row, part in zip(counts, parts, strict=True):
        for chunk in _sample(part):
            row += np.bincount(chunk >> np.uint16(shift), minlength=row.size)
        if part.size > _SAMPLE:
            row[int(part.min()) >> shift : (int(part.max()) >> shift) + 1] += 1
    while shift < 8 and counts.shape[1] > 2:  # cut more low bits while that saves more than it costs
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
    """Return the size of each row of counts when coded with a table of its own, in bits."""
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.ones(counts.shape), where=(counts > 0) & (total > 0))
    levels = -(counts * np.log2(share)).sum(axis=1)
    return np.asarray(levels + HEAD_BITS + 8 * (counts > 0).sum(axis=1), np.float64)


def _owners(counts: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which parts save more by a table of their own than it costs."""
    everything = counts.sum(axis=0)
    if len(counts) < 2 or not everything.any():
        return np.zeros(len(counts), np.bool_)
    shared = -np.log2(np.maximum(everything, 1) / everything.sum())
    return np.asarray((counts * shared).sum(axis=1) > _bits(counts))


def _table_of_part(tables: Sequence[Table], owners: NDArray[np.bool_]) -> Iterator[Table]:
    own = iter(tables[1:])
    for owner in owners:
        yield next(own) if owner else tables[0]
