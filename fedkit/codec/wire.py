"""Named arrays ⇄ frames: the only encode and decode.

A frame holds everything but names and shapes, which both sides know; it has an 8-byte digest of them, so that a
mismatch is an error rather than noise. `WIRE.md` is the specification, byte by byte; `fedkit.codec.snapshot` has
the frames that include names and shapes.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays, all_finite, check_finite, num_values, schema_digest
from fedkit.codec.entropy import order0_bits
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.frame import HEADER_SIZE, read_header, seal
from fedkit.codec.protocol import Quantized, Quantizer, join, thinned
from fedkit.codec.sections import (
    FLOAT32,
    MASK_DRAWN,
    MASKED,
    PER_ARRAY,
    Reader,
    mask_bits,
    read_groups,
    read_mask,
    split,
    write_groups,
    write_mask,
)
from fedkit.codec.sparsify import DrawnMask, Sparsifier, gather, scatter
from fedkit.errors import SchemaMismatchError, WireFormatError

_HEADS: Final = 24  # bytes of a group of `EntropyConstrained`, and of a small table
_LEAST: Final = 12  # bytes of values, at least: with fewer, nothing of a few values is ever sent
_TRIES: Final = 6  # attempts to meet a rate
_CLOSE: Final = 0.01  # relative distance to a rate that is close enough
_WORD: Final = 4  # bytes of a coded stream: no size lies between two that are so close


@dataclass(frozen=True, slots=True)
class Codec:
    """Updates to bytes: what to send, then as float32 or as the levels of a quantizer."""

    quantizer: Quantizer | None = None  # None: float32, lossless
    sparsifier: Sparsifier | None = None  # None: every entry, unless `encode` is given a mask

    def encode(
        self,
        update: NamedArrays,
        *,
        mask: Mask | DrawnMask | None = None,
        last_mask: Mask | None = None,
        rng: np.random.Generator | None = None,
    ) -> bytes:
        """Return `update` as one frame.

        Parameters
        ----------
        update : NamedArrays
            Arrays of any shapes.
        mask : Mask or DrawnMask, optional
            Which entries to send; the sparsifier's choice if unset. A drawn mask is sent as seed and density.
        last_mask : Mask, optional
            A mask that the receiver has, so that only its change need be sent.
        rng : np.random.Generator, optional
            For quantizers that draw; unpredictable if unset.

        Raises
        ------
        CodecError
            If an entry is NaN or infinite, or the mask has another schema.
        """
        check_finite(update)
        if mask is None and self.sparsifier is not None:
            mask = self.sparsifier.mask(update)
        parts = gather(update, mask.mask(update) if isinstance(mask, DrawnMask) else mask)
        flags, section = (0, b"") if mask is None else write_mask(mask, last_mask)
        count = sum(map(len, parts))
        if self.quantizer is None:
            values = [part.astype("<f4").tobytes() for part in parts]
            return seal(FLOAT32, flags, update, count, [section, *values])
        rng = np.random.default_rng() if rng is None else rng
        return _Draft(flags, update, parts, section).encode(self.quantizer, rng)


def decode(data: bytes, *, like: NamedArrays, last_mask: Mask | None = None) -> dict[str, NDArray[np.float32]]:
    """Return the arrays of a frame; entries that were masked out are zero.

    Parameters
    ----------
    data : bytes
        What `Codec.encode` returned.
    like : NamedArrays
        Arrays with the names, order and shapes that are expected. Nothing is allocated before they are checked.
    last_mask : Mask, optional
        The mask that the sender may have assumed to be known.

    Raises
    ------
    CodecError
        For bytes that are damaged, of another version, or of another schema.
    """
    return open_frame(data, like=like, last_mask=last_mask).arrays()


def open_frame(data: bytes, *, like: NamedArrays, last_mask: Mask | None = None) -> Frame:
    """Return a frame, checked, with its levels decoded; arguments and errors as in `decode`."""
    header = read_header(data)
    if header.digest != schema_digest(like):
        raise SchemaMismatchError(
            f"the frame holds {header.count} values of other names or shapes than the {num_values(like)} expected."
            " Does this node use another LoRA rank, or another base model?"
        )
    body = Reader(memoryview(data)[HEADER_SIZE + header.schema_size :])
    mask = read_mask(body, header.flags, like, last_mask) if header.flags & MASKED else None
    drawn = bool(header.flags & MASK_DRAWN)
    sizes = [int(m.sum()) for m in mask.values()] if mask else [array.size for array in like.values()]
    if header.count != sum(sizes):
        raise WireFormatError(f"count: expected {sum(sizes)} values, got {header.count}.")
    if header.grid == FLOAT32:
        values = np.frombuffer(body.take(4 * header.count), "<f4").astype(np.float32)
        frame = Frame(like, mask, drawn, sizes, values, [])
    else:
        frame = Frame(like, mask, drawn, sizes, None, read_groups(body, header.grid, header.flags, sizes))
    body.end()
    return frame


@dataclass(frozen=True, slots=True)
class Frame:
    """The contents of a frame, before levels are turned into values."""

    like: NamedArrays
    mask: dict[str, NDArray[np.bool_]] | None  # which entries are carried; None: all
    drawn: bool  # whether only seed and density of the mask were sent
    sizes: Sequence[int]  # number of values carried, per array
    raw: NDArray[np.float32] | None  # values as they were sent, or
    groups: Sequence[Quantized]  # as levels

    def values(self) -> NDArray[np.float32]:
        """Return the values that are carried, one array after the other.

        Raises
        ------
        WireFormatError
            If a level is not on its grid, or a value is not finite.
        """
        flat = join([quantized.group.dequantize(quantized.levels) for quantized in self.groups])
        flat = flat if self.raw is None else self.raw
        if not all_finite(flat):
            raise WireFormatError("the frame holds NaN or infinite values.")
        return flat

    def arrays(self, values: NDArray[np.float32] | None = None) -> dict[str, NDArray[np.float32]]:
        """Return the arrays, made of `values` if these are given; entries that were masked out are zero."""
        flat = self.values() if values is None else values
        return scatter(split(flat, self.sizes), self.mask, like=self.like)

    def ideal_bits(self) -> float:
        """Return the order-0 entropy of levels and mask, in bits; a float32 takes 32, a drawn mask nothing."""
        bits = 0.0 if self.mask is None or self.drawn else mask_bits(self.mask)
        levels = sum(order0_bits(quantized.levels) for quantized in self.groups)
        return bits + levels + (0 if self.raw is None else 32 * self.raw.size)


class _Draft:
    """The parts of a frame that stay the same while a rate is being met: all but the levels."""

    def __init__(self, flags: int, update: NamedArrays, parts: Sequence[NDArray[np.float32]], mask: bytes) -> None:
        self._flags, self._update, self._mask = flags, update, mask
        self._sizes = [part.size for part in parts]
        self._parts = parts

    def encode(self, quantizer: Quantizer, rng: np.random.Generator) -> bytes:
        """Return the frame that the quantizer makes."""
        if quantizer.per_array:
            return self._frame([quantizer.quantize([part], rng) for part in self._parts], PER_ARRAY)
        if isinstance(quantizer, EntropyConstrained) and any(self._sizes):
            return self._encode_to(quantizer.rate * num_values(self._update) / 8, quantizer)
        return self._frame([quantizer.quantize(self._parts, rng)], 0)

    def _encode_to(self, target: float, quantizer: EntropyConstrained) -> bytes:
        """Return the frame of about `target` bytes; the rate of large arrays is sought on a sample first."""
        fixed = HEADER_SIZE + len(self._mask) + _HEADS
        room = max(target - fixed, target / 2, min(_LEAST, sum(self._sizes)))
        sample, total = thinned(self._parts), sum(self._sizes)
        share = room / total * sum(part.size for part in sample)
        best = _meet(quantizer, sample, share, 8 * room / total, _CLOSE)
        if sample is not self._parts:
            best = _meet(quantizer, self._parts, room, best.rate, 3 * _CLOSE)
        return self._seal(best.group.group.grid, *best.written)

    def _frame(self, groups: list[Quantized], flags: int) -> bytes:
        coded, sections = write_groups(groups, self._sizes)
        return self._seal(groups[0].group.grid if groups else FLOAT32, flags | coded, sections)

    def _seal(self, grid: int, flags: int, sections: Sequence[bytes]) -> bytes:
        return seal(grid, self._flags | flags, self._update, sum(self._sizes), [self._mask, *sections])


class _Try(NamedTuple):
    """An attempt to meet a size."""

    rate: float  # asked for
    size: float  # obtained: bytes besides heads
    group: Quantized
    written: tuple[int, list[bytes]]  # flags and sections


def _try(quantizer: EntropyConstrained, parts: Sequence[NDArray[np.float32]], rate: float) -> _Try:
    group = quantizer.quantize_to(parts, rate)
    written = write_groups([group], [part.size for part in parts])
    return _Try(rate, max(1, sum(map(len, written[1])) - _HEADS), group, written)


def _meet(
    quantizer: EntropyConstrained, parts: Sequence[NDArray[np.float32]], room: float, rate: float, close: float
) -> _Try:
    """Return a try of about `room` bytes besides heads, within the share `close`; `rate` is tried first."""
    best = last = _try(quantizer, parts, rate)
    known = {0.0: 0.0}  # sizes, by rate
    for _ in range(_TRIES - 1):
        known[last.rate] = last.size
        if abs(best.size - room) <= close * room or _neighbours(known.values(), room):
            break
        last = _try(quantizer, parts, _between(known, room))
        best = min(best, last, key=lambda attempt: abs(attempt.size - room))
    return best


def _neighbours(sizes: Collection[float], room: float) -> bool:
    """Return whether no size is possible between the known ones next to `room`."""
    below = max(size for size in sizes if size <= room)
    return min((size for size in sizes if size > room), default=math.inf) - below <= _WORD


def _between(known: Mapping[float, float], room: float) -> float:
    """Return the rate at which a line through the known sizes next to `room` reaches `room`."""
    size, rate = max((size, rate) for rate, size in known.items() if size <= room)
    above = [(size, rate) for rate, size in known.items() if size > room]
    if not above:
        return rate * room / size
    size_above, rate_above = min(above)
    return rate + (rate_above - rate) * (room - size) / (size_above - size)
