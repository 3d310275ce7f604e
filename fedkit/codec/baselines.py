"""Baseline quantizers, each from its paper: QSGD, scaled sign, uniform blocks; EDEN has its own file.

=============  =====================================================================================
here           source
=============  =====================================================================================
`Qsgd`         D. Alistarh et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and
               Encoding", NeurIPS 2017, section 3.1
`Sign`         S. P. Karimireddy et al., "Error Feedback Fixes SignSGD and other Gradient Compression
               Schemes", ICML 2019, equation (2); to be used with `ErrorFeedback`
`Blocks`       T. Dettmers et al., "8-bit Optimizers via Block-wise Quantization", ICLR 2022; here evenly spaced
=============  =====================================================================================

Deviations
----------
`Qsgd` has one scale per array, and its levels go through fedkit's packing or entropy coder instead of Elias codes.
`Blocks` has scales of 16 bits.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from fedkit.codec.protocol import CHUNK, MAX_FLOAT32, Quantized, Take, check_bits, join
from fedkit.codec.quantize import MidRiseGroup, MidTreadGroup
from fedkit.errors import ConfigError, WireFormatError


@dataclass(frozen=True, slots=True)
class Qsgd:
    """Levels drawn at random so that their mean is the value: ``E[Q(v)] = v``.

    Law: an entry errs by less than a step, ``‖v‖₂ / (2^(bits−1) − 1)``.
    """

    bits: int = 4
    per_array: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_bits(2, self.bits)

    def quantize(self, parts: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> Quantized:
        """Return each value rounded up or down at random, in proportion."""
        values = join(parts)
        half = 2 ** (self.bits - 1) - 1
        norm = float(np.linalg.norm(values.astype(np.float64)))
        scale = float(np.float32(min(norm * (1 + 1e-7), MAX_FLOAT32)))  # not below the norm, nor below any value
        if scale == 0:
            return Quantized(MidTreadGroup(0, 0.0, values.size), np.zeros(values.size, np.uint16))
        exact = values.astype(np.float64) * (half / scale)
        levels = np.floor(exact + rng.random(values.size)) + half
        return Quantized(
            MidTreadGroup(self.bits, scale, values.size), np.clip(levels, 0, 2 * half).astype(np.uint16)
        )


@dataclass(frozen=True, slots=True)
class Sign:
    """The sign of each entry, times the mean size of the array's entries; zero counts as positive.

    Law: ``‖v − Q(v)‖² = ‖v‖² − ‖v‖₁² / d``, less than ``‖v‖²`` unless v is zero.
    """

    per_array: ClassVar[bool] = True

    def quantize(self, parts: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> Quantized:
        """Return 1 where a value is at least zero."""
        values = join(parts)
        scale = float(np.float32(np.abs(values).mean(dtype=np.float64))) if values.size else 0.0
        levels = (values >= 0).astype(np.uint16) if scale else np.zeros(values.size, np.uint16)
        return Quantized(MidRiseGroup(int(scale > 0), scale, values.size), levels)


@dataclass(frozen=True, slots=True)
class BlocksGroup:
    """Evenly spaced levels, one of them zero, with a half-range of its own for every block of entries."""

    bits: int
    block: int
    scales: NDArray[np.float16]  # one for each block
    count: int
    grid: ClassVar[int] = 5
    _head: ClassVar = struct.Struct("<BH")

    @property
    def num_levels(self) -> int:
        """One for each value."""
        return self.count

    def to_bytes(self) -> bytes:
        """Return bits, block size, and the scales."""
        return self._head.pack(self.bits, self.block) + self.scales.astype("<f2").tobytes()

    @classmethod
    def read(cls, take: Take, sizes: Sequence[int]) -> Self:
        """Return the group; inverse of `to_bytes`."""
        count = sum(sizes)
        bits, block = cls._head.unpack(take(cls._head.size))
        if not 2 <= bits <= 16 or block == 0:
            raise WireFormatError(f"blocks of {block} entries of {bits} bits: expected at least 1, and 2 to 16.")
        scales = np.frombuffer(take(2 * -(-count // block)), "<f2").astype(np.float16)
        if not (np.isfinite(scales) & (scales >= 0)).all():
            raise WireFormatError("the scale of a block is negative or not finite.")
        return cls(bits, block, scales, count)

    def dequantize(self, levels: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return ``(ψ − h) · scale / h`` with ``h = 2^(bits−1) − 1``."""
        half = 2 ** (self.bits - 1) - 1
        if (levels > 2 * half).any():
            raise WireFormatError(f"a level lies outside the grid of {2 * half + 1} levels.")
        values = np.empty(self.count, np.float32)
        for start in range(0, self.count, CHUNK):
            part = levels[start : start + CHUNK].astype(np.float64) - half
            scales = self.scales[np.arange(start, start + part.size) // self.block]
            values[start : start + CHUNK] = part * (scales.astype(np.float64) / half)
        return values


@dataclass(frozen=True, slots=True)
class Blocks:
    """Evenly spaced levels up to the largest entry of each block.

    Law: an entry errs by at most ``s / (2^bits − 2)``, half a step, plus ``s / 1024`` for the scale's own 16 bits,
    where s is its block's largest entry (while s is between 6e-5 and 65504, the range of the scale).
    """

    bits: int = 4
    block: int = 64
    per_array: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_bits(2, self.bits)
        if not 1 <= self.block < 2**16:
            raise ConfigError(f"block: expected 1 to 65535 entries, got {self.block}.")

    def quantize(self, parts: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> Quantized:
        """Return each value, divided by its block's step, rounded."""
        values = join(parts)
        half = 2 ** (self.bits - 1) - 1
        blocks = np.zeros((-(-values.size // self.block), self.block), np.float32)
        blocks.ravel()[: values.size] = values
        peaks = np.minimum(np.abs(blocks).max(axis=1, initial=0), np.finfo(np.float16).max)
        scales = peaks.astype(np.float16)
        steps = scales.astype(np.float32)[:, None] / half
        exact = np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0)
        levels = (np.clip(np.rint(exact), -half, half) + half).astype(np.uint16).ravel()[: values.size]
        return Quantized(BlocksGroup(self.bits, self.block, scales, values.size), levels)
