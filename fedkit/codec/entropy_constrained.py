"""fedkit's own quantizer: the least squared error at a rate that the user sets.

Levels are signed integers ``k``; ``|k|`` is 0 below the threshold t and grows by one with every step Δ above it. A
receiver turns k ≠ 0 into ``sign(k) (first + (|k| − 1) step)``. Its two numbers are fitted by least squares, so
that thresholds and values need not be related. The levels go to an entropy coder, so that the cost in bytes is
their entropy, not their number. For a given rate, `EntropyConstrained` tries several ratios t/Δ, solves each for
Δ, and takes the one with the least error:

- t near Δ/2, the rounding of uniform quantizers, at high rates;
- t above Δ (a dead zone) at low rates, for values with heavy tails: few large entries are worth their bytes;
- t just above 0, from 1 bit up, for values of almost equal size, as updates of local Adam training are.

Below 1 bit, such values are sent as signs of chosen blocks (`fedkit.codec.signs`) where that errs less: choosing
what to send beats widening the dead zone.

Background: G. J. Sullivan, "Efficient Scalar Quantization of Exponential and Laplacian Random Variables", IEEE
Trans. Inf. Theory 42(5), 1996 (uniform thresholds with a dead zone are optimal for Laplacian values); T. Berger,
"Optimum Quantizers and Permutation Codes", IEEE Trans. Inf. Theory 18(6), 1972 (entropy as constraint).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Final, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from fedkit.codec.protocol import CHUNK, MAX_FLOAT32, Quantized, Take, join, look_up, tame, thinned
from fedkit.codec.signs import SignsGroup, send_signs, signs_error
from fedkit.errors import ConfigError, WireFormatError

MIN_RATE: Final = 0.05
MAX_RATE: Final = 8.0
SIGNS_BELOW: Final = 1.1  # bits per value; all signs, blocks and scales take a little more than 1
MAX_HALF: Final = 2**15 - 1
_RATIOS: Final = (0.5, 0.55, 0.6, 0.7, 0.85, 1.0, 1.3, 1.8, 2.5, 1e-6)  # threshold / step; the last: only 0 is 0
_SAMPLE: Final = 2**15  # values looked at to choose thresholds
_AS_GOOD: Final = 1.03  # times the error up to which signs are preferred: they decode much faster
_ONE_TABLE: Final = 127  # levels of one sign whose table needs no separate low bits
_HALVINGS: Final = 10  # of the interval in which the step is sought, at most a factor of 4
_EXACT: Final = 255  # largest level whose squares float32 sums well enough


class Design(NamedTuple):
    """Thresholds, and their error on the sample."""

    threshold: float
    step: float
    error: float  # share of the energy that is lost


@dataclass(frozen=True, slots=True)
class DesignedGroup:
    """Signed levels, and the line that gives their values."""

    half: int  # levels are −half to half, on the wire 0 to 2 half
    first: float
    step: float
    count: int
    grid: ClassVar[int] = 3
    _head: ClassVar = struct.Struct("<Hff")

    @property
    def bits(self) -> int:
        """Width of a packed level."""
        return (2 * self.half).bit_length()

    @property
    def num_levels(self) -> int:
        """One for each value."""
        return self.count

    def to_bytes(self) -> bytes:
        """Return half, first and step."""
        return self._head.pack(self.half, self.first, self.step)

    @classmethod
    def read(cls, take: Take, sizes: Sequence[int]) -> Self:
        """Return the group; inverse of `to_bytes`."""
        half, first, step = cls._head.unpack(take(cls._head.size))
        if half > MAX_HALF or not (math.isfinite(first) and math.isfinite(step)):
            raise WireFormatError(f"levels up to {half}, from {first} in steps of {step}: out of range.")
        return cls(half, first, step, sum(sizes))

    def dequantize(self, levels: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return ``sign(k) (first + (|k| − 1) step)`` with ``k = level − half``, and 0 for k = 0."""

        def value_of(level: NDArray[np.float64]) -> NDArray[np.float64]:
            k = level - self.half
            return np.sign(k) * (self.first + (np.abs(k) - 1) * self.step)

        return look_up(levels, 2 * self.half, value_of)

    def times_two_to(self, power: int) -> Self:
        """Return the group of the same values times ``2**power``, as far as float32 reaches."""
        first, step = np.clip(np.ldexp([self.first, self.step], power), -MAX_FLOAT32, MAX_FLOAT32)
        return replace(self, first=float(np.float32(first)), step=float(np.float32(step)))


@dataclass(frozen=True, slots=True)
class EntropyConstrained:
    """The least squared error at `rate` bits per parameter, any number from 0.05 to 8.

    The rate is that of the whole frame over all parameters: entries left out by a mask make room for the others.

    Law: ``‖v − Q(v)‖ <= ‖v‖``; the frame has the size asked for within 5 %, or 128 bytes, unless v has too few
    distinct values to need that many, or tails as heavy as Cauchy's (then up to a third more, near 1 bit).
    """

    rate: float = 1.0
    per_array: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not MIN_RATE <= self.rate <= MAX_RATE:
            raise ConfigError(f"rate: expected {MIN_RATE} to {MAX_RATE} bits per parameter, got {self.rate}.")

    def quantize(self, parts: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> Quantized:
        """Return the levels of least error that take about the rate for each value."""
        return self.quantize_to(parts, self.rate)

    def quantize_to(self, parts: Sequence[NDArray[np.float32]], rate: float) -> Quantized:
        """Return the levels of least error that take about `rate` bits for each value."""
        parts, power = tame(parts)
        sample = thinned(parts)
        design = best_design(join(sample), rate)
        group: DesignedGroup | SignsGroup
        if rate < SIGNS_BELOW and signs_error(sample, rate) < _AS_GOOD * design.error:
            group, levels = send_signs(parts, rate)
        else:
            group, levels = _threshold(join(parts), design)
        return Quantized(group.times_two_to(power) if power else group, levels)


def best_design(values: NDArray[np.float32], rate: float) -> Design:
    """Return the thresholds of least error that take about `rate` bits per value, found on a sample."""
    if values.size > _SAMPLE:
        values = values[np.random.default_rng(0).integers(values.size, size=_SAMPLE)]
    sample = _Sample.of(values)
    if sample.energy == 0:
        return Design(math.inf, 1.0, 0.0)
    designs = []
    for ratio in _RATIOS if rate > 0.99 else _RATIOS[:-1]:  # a rate is met only to a percent anyway
        step = sample.solve(ratio, rate)
        designs.append(Design(ratio * step, step, sample.try_out(ratio * step, step).error))
    return min(designs, key=lambda design: design.error)


class _Outcome(NamedTuple):
    rate: float  # entropy of the levels, bits per value
    error: float  # share of the energy that is lost


class _Sample(NamedTuple):
    sizes: NDArray[np.float64]  # absolute values, ascending
    sums: NDArray[np.float64]  # of the first n sizes
    energy: float
    finest: float  # entropy of the values themselves, bits per value

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> Self:
        sizes = np.sort(np.abs(values).astype(np.float64))
        shares = np.diff(np.flatnonzero(np.diff(sizes, prepend=-1, append=np.inf))) / max(sizes.size, 1)
        finest = -(shares * np.log2(shares)).sum() + np.count_nonzero(sizes) / max(sizes.size, 1)
        return cls(sizes, np.concatenate([[0.0], np.cumsum(sizes)]), float(sizes @ sizes), float(finest))

    def try_out(self, threshold: float, step: float) -> _Outcome:
        at, j = self._levels(threshold, step)
        counts, sums = np.diff(at), np.diff(self.sums[at])
        shares = np.concatenate([[at[0]], counts]) / self.sizes.size
        shares = shares[shares > 0]
        rate = -(shares * np.log2(shares)).sum() + 1 - at[0] / self.sizes.size
        first, slope = _line(counts.sum(), float(counts @ j), float(counts @ j**2), sums.sum(), float(sums @ j))
        return _Outcome(rate, 1 - (first * sums.sum() + slope * (sums @ j)) / self.energy)

    def _levels(self, threshold: float, step: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """Return where the sizes of each level begin, from the threshold on, and these levels."""
        count, peak = self.sizes.size, self.sizes[-1]
        steps = max(0, int((peak - threshold) / step)) if threshold <= peak else 0
        if steps < count:
            j = np.arange(steps + 1, dtype=np.float64)
            return np.concatenate([np.searchsorted(self.sizes, threshold + step * j), [count]]), j
        zeros = int(np.searchsorted(self.sizes, threshold))
        levels = np.floor((self.sizes[zeros:] - threshold) / step)
        starts = np.flatnonzero(np.diff(levels, prepend=-1.0))
        return np.concatenate([zeros + starts, [count]]), levels[starts]

    def solve(self, ratio: float, rate: float) -> float:
        """Return the step at which thresholds from ``ratio · step`` on take `rate` bits per value."""
        high = most = 2.01 * float(self.sizes[-1])  # half of it is above every value
        low = high / 4
        wanted = min(rate, self.finest - 1e-9)
        while self.try_out(ratio * low, low).rate < wanted and low > most * 2.0**-15:
            low, high = low / 2, low
        if rate > wanted:
            return low  # there are few distinct sizes, which smaller steps would not separate better
        for _ in range(_HALVINGS):
            middle = math.sqrt(low * high)
            if self.try_out(ratio * middle, middle).rate > rate:
                low = middle
            else:
                high = middle
        return high


def _line(n: float, j: float, jj: float, y: float, jy: float, exact: float = 1e-9) -> tuple[float, float]:
    """Return intercept and slope of least squares from the sums of 1, j, j², y and j·y, of precision `exact`."""
    spread = n * jj - j * j
    if spread <= exact * n * jj or n == 0:
        return (y / n if n else 0.0), 0.0
    slope = (n * jy - j * y) / spread
    return (y - slope * j) / n, slope


def _threshold(values: NDArray[np.float32], design: Design) -> tuple[DesignedGroup, NDArray[np.uint16]]:
    """Return the levels, and the line that reproduces the values best."""
    peak = float(np.abs(values).max(initial=0))
    if design.threshold > peak or peak == 0:
        return DesignedGroup(0, 0.0, 0.0, values.size), np.zeros(values.size, np.uint16)
    inverse = np.float32(1 / design.step)
    offset = np.float32(1 - design.threshold / design.step)
    half = min(MAX_HALF, int(np.float32(peak) * inverse + offset) + 1)
    if half > _ONE_TABLE and _beyond(values, design.threshold + _ONE_TABLE * design.step) < design.error / 2:
        half = _ONE_TABLE  # else a few outliers would make the table larger for all levels
    levels, sums = np.empty(values.size, np.uint16), np.zeros(5)
    for start in range(0, values.size, CHUNK):
        part = values[start : start + CHUNK]
        size = np.abs(part)
        k = np.trunc(np.clip(size * inverse + offset, 0, half))
        np.add(np.copysign(k, part), half, out=levels[start : start + CHUNK], casting="unsafe")
        if half > _EXACT:
            k, size = k.astype(np.float64), size.astype(np.float64)
        sent = (k > 0).astype(k.dtype)
        sums += [sent.sum(), k.sum(dtype=np.float64), k @ k, size @ sent, size @ k]
    n, k_, kk, y, ky = sums
    first, step = _line(n, k_ - n, kk - 2 * k_ + n, y, ky - y, 1e-9 if half > _EXACT else 1e-6)
    return DesignedGroup(half, float(np.float32(first)), float(np.float32(step)), values.size), levels


def _beyond(values: NDArray[np.float32], limit: float) -> float:
    """Return the share of the energy that is lost if values are clipped at `limit`."""
    lost = energy = 0.0
    for start in range(0, values.size, CHUNK):
        size = np.abs(values[start : start + CHUNK])
        over = np.maximum(size - np.float32(limit), 0)
        lost, energy = lost + float(over @ over), energy + float(size @ size)
    return lost / energy
