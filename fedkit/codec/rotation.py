"""EDEN: a random rotation makes any vector look normal; its levels are the best for a normal distribution.

S. Vargaftik et al., "EDEN: Communication-Efficient and Robust Distributed Mean Estimation for Federated
Learning", ICML 2022, https://arxiv.org/abs/2108.08842. With 1 bit it is their DRIVE (NeurIPS 2021).

========  =============================================  ==================
paper     meaning                                        here
========  =============================================  ==================
R         rotation: random signs, Hadamard transform     `rotate`
Q         nearest centre for a normal distribution       `CENTRES`
S         scale; ``‖x‖² / ⟨R x, Q(R x)⟩`` is unbiased    `scales`
========  =============================================  ==================

Deviations from the paper
-------------------------
Blocks of 4,096 entries are rotated instead of the whole vector, which takes half as many passes and less padding;
each block has its own scale. By default this is the scale of least squared error; ``unbiased=True`` gives EDEN's.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Self

import numpy as np
from numpy.typing import NDArray

from fedkit.codec.protocol import MAX_FLOAT32, Quantized, Take, join, look_up, tame
from fedkit.errors import ConfigError, WireFormatError

BLOCK: Final = 4096  # entries rotated together

_POSITIVE: Final = (  # J. Max, "Quantizing for Minimum Distortion", IRE Trans. Inf. Theory 6(1), 1960, table I
    (0.7979,),
    (0.4528, 1.510),
    (0.2451, 0.7560, 1.344, 2.152),
    (0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733),
)
CENTRES: Final = [np.array([-c for c in reversed(half)] + list(half), np.float32) for half in _POSITIVE]
"""For 1 to 4 bits, the centres of least squared error for a standard normal distribution."""


@dataclass(frozen=True, slots=True)
class RotatedGroup:
    """Levels of rotated blocks, and a scale for each block."""

    bits: int
    seed: int  # of the rotation
    scales: NDArray[np.float32]  # one for each block of BLOCK entries
    count: int
    grid: ClassVar[int] = 4
    _head: ClassVar = struct.Struct("<BI")

    @property
    def num_levels(self) -> int:
        """One for each entry of the blocks, the last of which is padded with zeros."""
        return padded_size(self.count)

    def to_bytes(self) -> bytes:
        """Return bits, seed and scales."""
        return self._head.pack(self.bits, self.seed) + self.scales.astype("<f4").tobytes()

    @classmethod
    def read(cls, take: Take, sizes: Sequence[int]) -> Self:
        """Return the group; inverse of `to_bytes`."""
        count = sum(sizes)
        bits, seed = cls._head.unpack(take(cls._head.size))
        if not 1 <= bits <= len(CENTRES):
            raise WireFormatError(f"rotated blocks of {bits} bits: expected 1 to {len(CENTRES)}.")
        scales = np.frombuffer(take(4 * -(-count // BLOCK)), "<f4").astype(np.float32)
        if not np.isfinite(scales).all():
            raise WireFormatError("the scale of a block is not finite.")
        return cls(bits, seed, scales, count)

    def dequantize(self, levels: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return the centres, rotated back and scaled."""
        centres = CENTRES[self.bits - 1].astype(np.float64)
        values = rotate(
            look_up(levels, 2**self.bits - 1, lambda level: centres[level.astype(np.intp)]), self.seed, back=True
        )
        with np.errstate(over="ignore"):
            for block, scale in enumerate(self.scales):
                values[block * BLOCK : (block + 1) * BLOCK] *= scale
        return np.clip(values, -MAX_FLOAT32, MAX_FLOAT32, out=values)[: self.count]


@dataclass(frozen=True, slots=True)
class Eden:
    """Rotates values, then quantizes them as if they were normal.

    Law: for long vectors, the squared error is that of a normal distribution: ``.3634 ‖v‖²`` at 1 bit,
    ``.1175 ‖v‖²`` at 2, ``.0345 ‖v‖²`` at 3, ``.0095 ‖v‖²`` at 4, whatever v is.
    """

    bits: int = 1
    unbiased: bool = False
    per_array: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= len(CENTRES):
            raise ConfigError(f"bits: expected 1 to {len(CENTRES)}, got {self.bits}.")

    def quantize(self, parts: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> Quantized:
        """Return the nearest centre of each rotated entry."""
        parts, power = tame(parts)
        values = join(parts)
        seed = int(rng.integers(2**32))
        padded = np.zeros(padded_size(values.size), np.float32)
        padded[: values.size] = values
        rotated, centres = rotate(padded, seed), CENTRES[self.bits - 1]
        blocks = _blocks(rotated)
        energy = np.square(blocks, dtype=np.float64).sum(axis=1)
        sizes = np.minimum(BLOCK, rotated.size - BLOCK * np.arange(len(blocks)))
        rms = np.sqrt(energy / sizes).astype(np.float32)[:, None]
        unit = np.divide(blocks, rms, out=np.zeros_like(blocks), where=rms > 0)
        levels = np.searchsorted((centres[1:] + centres[:-1]) / 2, unit).astype(np.uint16)
        chosen = centres[levels].astype(np.float64)
        chosen.ravel()[rotated.size :] = 0
        along = (blocks * chosen).sum(axis=1)
        below = along if self.unbiased else np.square(chosen).sum(axis=1)
        scales = np.divide(energy if self.unbiased else along, below, out=np.zeros_like(along), where=below > 0)
        scales = np.minimum(np.ldexp(scales, power), MAX_FLOAT32).astype(np.float32)
        group = RotatedGroup(self.bits, seed, scales, values.size)
        return Quantized(group, levels.ravel()[: rotated.size])


def rotate(values: NDArray[np.float32], seed: int, *, back: bool = False) -> NDArray[np.float32]:
    """Return random signs, then the Hadamard transform, of each block of `values`; `back`: the inverse.

    The length must be a `padded_size`. Additions have a fixed order, so that all machines get the same values.
    """
    raw = np.random.Philox(key=seed).random_raw(-(-values.size // 64)).astype("<u8")
    bits = np.unpackbits(raw.view(np.uint8), bitorder="little")[: values.size]
    minus, mixed = bits.view(np.bool_), values.copy()
    if not back:
        np.negative(mixed, out=mixed, where=minus)
    whole = values.size // BLOCK * BLOCK
    for part in (mixed[:whole].reshape(-1, BLOCK), mixed[whole:].reshape(1, -1)):
        if part.size:
            _hadamard(part)
    return np.negative(mixed, out=mixed, where=minus) if back else mixed


def padded_size(count: int) -> int:
    """Return `count` rounded up so that the last block, too, is a power of two.

    >>> padded_size(4096 + 33)
    4160
    """
    whole, rest = divmod(count, BLOCK)
    return whole * BLOCK + (1 << (rest - 1).bit_length() if rest else 0)


def _hadamard(blocks: NDArray[np.float32]) -> None:
    """Transform each row in place; the number of entries of a row is a power of two."""
    size, step = blocks.shape[1], 1
    while step < size:
        pairs = blocks.reshape(blocks.shape[0], size // (2 * step), 2, step)
        total = pairs[:, :, 0] + pairs[:, :, 1]
        np.subtract(pairs[:, :, 0], pairs[:, :, 1], out=pairs[:, :, 1])
        pairs[:, :, 0] = total
        step *= 2
    blocks *= np.float32(1 / np.sqrt(max(size, 1)))


def _blocks(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return `values` as rows of BLOCK entries, the last one padded with zeros."""
    rows = np.zeros((-(-values.size // BLOCK), BLOCK), np.float32)
    rows.ravel()[: values.size] = values
    return rows
