"""AQUILA's quantizer as published, and a form of it that works.

Z. Zhao, Y. Mao, Z. Shi, et al., "AQUILA: Communication Efficient Federated Learning with Adaptive
Quantization in Device Selection Strategy", IEEE TMC 23(6), 2024, https://arxiv.org/abs/2308.00258.

===========  =========================================  =================================
paper        meaning                                    here
===========  =========================================  =================================
v            innovation, d entries                      `values`
R            ``‖v‖∞``                                   `scale` of `AquilaMidTread`
b            bits per entry                             `bits`
b*           ``⌊log2(R √d / ‖v‖₂ + 1)⌋``                `adaptive_bits`
τ            ``1 / (2^b − 1)``; the step is ``2 τ R``    `step`
ψ            integer level, 0 to ``2^b − 1``            `levels`
===========  =========================================  =================================

Deviations from the paper
-------------------------
`AquilaMidTread`: none known (we knew the paper through third-party code and its parent method, LAQ); an innovation
of zeros, for which the equations give 0/0, takes no bits. `ZeroMidTread` is our own: it keeps b* but starts at
2 bits, has a level at zero, one scale per array, and the scale of least squared error instead of R. It exists
because updates of local Adam training have entries of almost equal size, for which b* is 1; the published grid,
which has no zero, then turns every entry into ±R.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedkit.codec.protocol import MAX_BITS, Quantized, Take, check_bits, join, look_up
from fedkit.errors import ConfigError, WireFormatError

_SAMPLE = 4096  # values sampled to choose a scale


@dataclass(frozen=True, slots=True)
class ScaledGroup:
    """A group with a half-range: base of `MidRiseGroup` and `MidTreadGroup`."""

    bits: int  # 0: every value is zero
    scale: float  # half-range, a float32
    count: int
    _head: ClassVar = struct.Struct("<Bf")

    @property
    def num_levels(self) -> int:
        """One for each value."""
        return self.count

    def to_bytes(self) -> bytes:
        """Return bits and scale."""
        return self._head.pack(self.bits, self.scale)

    @classmethod
    def read(cls, take: Take, sizes: Sequence[int]) -> Self:
        """Return the group; inverse of `to_bytes`."""
        bits, scale = cls._head.unpack(take(cls._head.size))
        if bits > MAX_BITS or not math.isfinite(scale) or scale < 0:
            raise WireFormatError(
                f"a group of {bits} bits and scale {scale}: expected 0 to {MAX_BITS}, and a finite scale."
            )
        return cls(bits, scale, sum(sizes))


@dataclass(frozen=True, slots=True)
class MidRiseGroup(ScaledGroup):
    """2^b levels from −scale to scale, evenly spaced, none at zero."""

    grid: ClassVar[int] = 1

    def dequantize(self, levels: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return ``ψ · 2 scale / (2^b − 1) − scale``."""
        if self.bits == 0:
            return np.zeros(self.count, np.float32)
        top = 2**self.bits - 1
        return look_up(levels, top, lambda level: level * (2 * self.scale / top) - self.scale)


@dataclass(frozen=True, slots=True)
class MidTreadGroup(ScaledGroup):
    """2^b − 1 levels from −scale to scale, evenly spaced, one of them zero."""

    grid: ClassVar[int] = 2

    def dequantize(self, levels: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return ``(ψ − h) · scale / h`` with ``h = 2^(b−1) − 1``."""
        if self.bits == 0:
            return np.zeros(self.count, np.float32)
        half = 2 ** (self.bits - 1) - 1
        if half == 0:
            raise WireFormatError("a grid with a zero takes 2 bits at least, or none.")
        return look_up(levels, 2 * half, lambda level: (level - half) * (self.scale / half))


@dataclass(frozen=True, slots=True)
class AquilaMidTread:
    """AQUILA's quantizer as published: 2^b levels from −R to R, none of them zero, b = b* within the bounds.

    With equal bounds it is LAQ's quantizer.

    Law: every entry errs by at most τR, half a step.
    """

    max_bits: int = MAX_BITS
    min_bits: int = 1
    per_array: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(self.min_bits, self.max_bits)

    def quantize(self, parts: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> Quantized:
        """Return ``ψ = ⌊(v + R) / (2 τ R) + 1/2⌋``, clipped to 0..2^b − 1."""
        values = join(parts)
        scale = float(np.abs(values).max(initial=0))
        bits = adaptive_bits(values, self.min_bits, self.max_bits)
        if bits == 0:
            return Quantized(MidRiseGroup(0, 0.0, values.size), _no_levels(values))
        step = 2 * scale / (2**bits - 1)
        psi = np.floor((values.astype(np.float64) + scale) / step + 0.5)
        return Quantized(MidRiseGroup(bits, scale, values.size), np.clip(psi, 0, 2**bits - 1).astype(np.uint16))


@dataclass(frozen=True, slots=True)
class ZeroMidTread:
    """Uniform levels with one at zero: 2^b − 1 levels from −scale to scale, b* bits but at least 2.

    The scale is the one, of those tried, with the least squared error; values outside are clipped.

    Laws: an entry within the scale errs by at most half a step, one outside by what it exceeds the scale; no
    entry changes sign or has an error larger than its own size, so ``‖v − Q(v)‖ < ‖v‖`` unless v is zero.
    """

    min_bits: int = 2
    max_bits: int = 8
    per_array: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bits(self.min_bits, self.max_bits)
        if self.min_bits < 2:
            raise ConfigError(f"a grid with a zero needs at least 2 bits, got min_bits={self.min_bits}.")

    def quantize(self, parts: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> Quantized:
        """Return ``round(v / step)``, clipped and shifted to 0..2^b − 2."""
        values = join(parts)
        bits = adaptive_bits(values, self.min_bits, self.max_bits)
        if bits == 0:
            return Quantized(MidTreadGroup(0, 0.0, values.size), _no_levels(values))
        half = 2 ** (bits - 1) - 1
        scale = _least_squares_scale(values, half)
        levels = np.clip(np.rint(values.astype(np.float64) / (scale / half)), -half, half)
        return Quantized(MidTreadGroup(bits, scale, values.size), (levels + half).astype(np.uint16))


def adaptive_bits(values: NDArray[np.float32], min_bits: int, max_bits: int) -> int:
    """Return AQUILA's level ``b* = ⌊log2(‖v‖∞ √d / ‖v‖₂ + 1)⌋`` within the bounds; 0 if all are zero.

    >>> adaptive_bits(np.array([1, -1, 1, 1], np.float32), 1, 16)
    1
    """
    peak = float(np.abs(values).max(initial=0))
    if peak == 0:
        return 0
    norm = float(np.linalg.norm(values.astype(np.float64)))
    best = math.floor(math.log2(peak * math.sqrt(values.size) / norm + 1))
    return min(max(best, min_bits), max_bits)


def _least_squares_scale(values: NDArray[np.float32], half: int) -> float:
    """Return the scale, of 24 between rms/2 and the peak, with the least squared error on a sample."""
    size = np.abs(values)
    peak, rms = float(size.max()), float(np.sqrt(np.mean(np.square(size, dtype=np.float64))))
    step = max(1, size.size // _SAMPLE)
    while math.gcd(step, size.size) > 1 and step > 1:  # else it sees some columns of a matrix alone
        step += 1
    sample = size[::step].astype(np.float64)
    scales = np.geomspace(min(rms / 2, peak), peak, 24)
    steps = (scales / half)[:, None]
    errors = np.square(sample - steps * np.minimum(np.rint(sample / steps), half)).sum(axis=1)
    return float(np.float32(scales[np.argmin(errors)])) or peak  # a subnormal can round to zero


def _no_levels(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    return np.zeros(values.size, np.uint16)
