"""EDEN and DRIVE: rotate at random, then quantize the result, which is nearly Gaussian.

S. Vargaftik, R. Ben Basat, A. Portnoy, et al., "EDEN: Communication-Efficient and Robust Distributed Mean
Estimation for Federated Learning", ICML 2022, https://arxiv.org/abs/2108.08842; the same authors, "DRIVE:
One-bit Distributed Mean Estimation", NeurIPS 2021. They have no installable package, so the algorithm of their
torch code is transcribed: random signs, a fast Walsh-Hadamard transform, the Lloyd-Max centroids of a Gaussian,
a scale. Below 1 bit, a random share of the entries is kept and coded at 1 bit; between whole bits, each entry
takes the lower or the higher number of bits at random. DRIVE is EDEN at 1 bit.

Two things are better than in the published code, so that a codec that beats this beats EDEN: a vector is cut into
blocks whose lengths are powers of two instead of being padded to the next one (74,498 would become 131,072),
and there is a form with the least-squares scale. The published scale makes the estimate unbiased, at a larger
error.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Peer, Vector, pack, packed_size, require, unpack

SMALLEST = 64  # a last block shorter than this is padded
_HEAD = struct.Struct("<q")  # the seed
_SCALE = struct.Struct("<f")


@dataclass(frozen=True)
class Eden:
    """EDEN at `bits` per entry, any number up to 8."""

    bits: float
    unbiased: bool
    padded: bool = False

    def encode(self, vector: Vector) -> bytes:
        """Return seed, then scale and packed centroids' numbers of each block."""
        kept, parts, seed = self._kept(vector.size), [_HEAD.pack(1)], 1
        values = vector if kept is None else vector[kept]
        gain = 1 / self.bits if kept is not None and self.unbiased else 1.0
        for start, stop, size in blocks(values.size, self.padded):
            rotated = rotate(values[start:stop], size, seed + start)
            norm = float(np.linalg.norm(rotated)) or 1.0
            unit = rotated * (math.sqrt(size) / norm)
            high = self._high(size, start)
            levels = [np.searchsorted(boundaries(b), unit[part]) for b, part in high]
            centres = np.empty(size, np.float32)
            for (bits, part), level in zip(high, levels, strict=True):
                centres[part] = centroids(bits)[level]
            along = float(centres @ rotated)
            scale = norm**2 / along if self.unbiased else along / float(centres @ centres)
            parts.append(_SCALE.pack(gain * scale))
            parts += [pack(level, bits) for (bits, _), level in zip(high, levels, strict=True)]
        return b"".join(parts)

    def decode(self, data: bytes, count: int) -> Vector:
        """Return the blocks, rotated back, at the places that were kept."""
        (seed,), body = _HEAD.unpack_from(data), memoryview(data)[_HEAD.size :]
        kept = self._kept(count)
        values = np.zeros(count if kept is None else kept.size, np.float32)
        for start, stop, size in blocks(values.size, self.padded):
            (scale,), body = _SCALE.unpack_from(body), body[_SCALE.size :]
            centres = np.empty(size, np.float32)
            for bits, part in self._high(size, start):
                number = centres[part].size
                centres[part] = centroids(bits)[unpack(body, number, bits)]
                body = body[packed_size(number, bits) :]
            values[start:stop] = scale * rotate_back(centres, seed + start)[: stop - start]
        if kept is None:
            return values
        whole = np.zeros(count, np.float32)
        whole[kept] = values
        return whole

    def _kept(self, count: int) -> NDArray[np.intp] | None:
        """Return which entries are sent, None: all of them."""
        if self.bits >= 1:
            return None
        return np.flatnonzero(np.random.default_rng(count).random(count) < self.bits)

    def _high(self, size: int, seed: int) -> list[tuple[int, Any]]:
        """Return the numbers of bits, and which entries take them."""
        low = max(math.floor(self.bits), 1)
        if self.bits <= 1 or self.bits == low:
            return [(low, slice(None))]
        mask = np.random.default_rng(seed).random(size) < self.bits - low
        return [(low, ~mask), (low + 1, mask)]


def blocks(count: int, padded: bool) -> list[tuple[int, int, int]]:
    """Return start, stop and rotated length of each block; the lengths are powers of two."""
    if padded:
        return [(0, count, 1 << max(count - 1, 1).bit_length())]
    cut, start = [], 0
    while count - start >= SMALLEST:
        size = 1 << ((count - start).bit_length() - 1)
        cut.append((start, start + size, size))
        start += size
    return [*cut, (start, count, SMALLEST)] if start < count else cut


def rotate(values: Vector, size: int, seed: int) -> Vector:
    """Return the randomised Hadamard transform of `values`, padded with zeros to `size`."""
    torch = require("torch", "torch")
    padded = torch.zeros(size)
    padded[: values.size] = torch.from_numpy(np.ascontiguousarray(values))
    return np.asarray(_hadamard(padded * _signs(size, seed)).numpy())


def rotate_back(values: Vector, seed: int) -> Vector:
    """Return the inverse of `rotate`."""
    torch = require("torch", "torch")
    return np.asarray((_hadamard(torch.from_numpy(values)) * _signs(values.size, seed)).numpy())


def _signs(size: int, seed: int) -> Any:
    torch = require("torch", "torch")
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.empty(size).bernoulli_(generator=generator) - 1


def _hadamard(vector: Any) -> Any:
    """Transform in place, as the published code does: log2(size) passes of sums and differences."""
    half, size = 1, vector.numel()
    while half < size:
        pairs = vector.view(-1, 2, half)
        left, right = pairs[:, 0], pairs[:, 1]
        left += right
        right.mul_(-2).add_(left)
        half *= 2
    return vector.mul_(size**-0.5)


@cache
def centroids(bits: int) -> Vector:
    """Return the ``2**bits`` Lloyd-Max centroids of a standard Gaussian, found by Lloyd's iteration."""
    special = require("scipy.special", "scipy")
    count = 2**bits
    centres = special.ndtri((np.arange(count) + 0.5) / count) * 1.6  # close: the best density is p^(1/3)
    for _ in range(4000):
        edges = np.concatenate([[-np.inf], (centres[1:] + centres[:-1]) / 2, [np.inf]])
        density = np.exp(-np.square(edges) / 2) / math.sqrt(2 * math.pi)
        centres = (density[:-1] - density[1:]) / np.diff(special.ndtr(edges))
    return np.asarray(centres, np.float32)


@cache
def boundaries(bits: int) -> Vector:
    """Return the edges between the cells of the centroids."""
    centres = centroids(bits)
    return np.asarray((centres[1:] + centres[:-1]) / 2)


RATES = (0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
ROTATIONS = (
    Peer("EDEN (transcribed)", lambda bits: Eden(bits, unbiased=True), RATES, "bits", 1.0),
    Peer("EDEN, least squares (transcribed)", lambda bits: Eden(bits, unbiased=False), RATES, "bits"),
    Peer("EDEN, padded as published (transcribed)", lambda b: Eden(b, True, padded=True), RATES, "bits", 1.0),
    Peer("DRIVE (transcribed)", lambda bits: Eden(bits, unbiased=True), (1.0,), "bits"),
)
