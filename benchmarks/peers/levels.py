"""QSGD, NVFlare's filters, top-k: levels or indices, with one scale per block."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.peers.base import Peer, Vector, require


@dataclass(frozen=True)
class Qsgd:
    """QSGD: stochastic levels of a block's 2-norm, in Elias's gamma code (transcribed).

    D. Alistarh, D. Grubic, J. Li, et al., "QSGD: Communication-Efficient SGD via Gradient Quantization and
    Encoding", NIPS 2017, section 3: each nonzero level as its sign, its size, and the distance from the one
    before (sparse), or each level plus one, and a sign where it is not zero (dense); here whichever is smaller.
    The gammas' unary halves come first, then their binary halves: as many bits, and numpy can read them.
    """

    levels: int  # above zero
    bucket: int  # 0: the whole vector
    peak: bool = False  # levels of a bucket's maximum instead, as in the paper's experiments

    def encode(self, vector: Vector) -> bytes:
        """Return one byte for the form, the norms, the signs, the codes."""
        bucket = self.bucket or vector.size
        padded = np.zeros(-(-vector.size // bucket) * bucket, np.float32)
        padded[: vector.size] = vector
        order = np.inf if self.peak else 2
        norms = np.linalg.norm(padded.reshape(-1, bucket), ord=order, axis=1).astype(np.float32)
        ratio = np.abs(padded.reshape(-1, bucket)) * (self.levels / np.maximum(norms, 1e-30))[:, None]
        noise = np.random.default_rng(0).random(ratio.shape, np.float32)
        sizes = np.floor(ratio + noise).astype(np.int64).ravel()[: vector.size]
        places = np.flatnonzero(sizes)
        signs = np.packbits(vector[places] < 0).tobytes()
        gaps = np.diff(places, prepend=-1)
        number = np.uint32(places.size).tobytes()
        dense = b"d" + norms.tobytes() + gamma(sizes + 1) + signs
        sparse = b"s" + norms.tobytes() + number + gamma(np.concatenate([gaps, sizes[places]])) + signs
        return dense if len(dense) < len(sparse) else sparse

    def decode(self, data: bytes, count: int) -> Vector:
        """Return norm · sign · level / levels."""
        bucket = self.bucket or count
        number = -(-count // bucket)
        norms, body = np.frombuffer(data, np.float32, number, 1), data[1 + 4 * number :]
        sizes = np.zeros(count, np.int64)
        if data[:1] == b"d":
            codes, body = ungamma(body, count)
            sizes[:] = codes - 1
        else:
            kept = int(np.frombuffer(body, np.uint32, 1)[0])
            codes, body = ungamma(body[4:], 2 * kept)
            sizes[np.cumsum(codes[:kept]) - 1] = codes[kept:]
        places = np.flatnonzero(sizes)
        signs = 1 - 2 * np.unpackbits(np.frombuffer(body, np.uint8), count=places.size).astype(np.float32)
        values = np.zeros(count, np.float32)
        values[places] = signs * sizes[places] * norms[places // bucket] / self.levels
        return values


def gamma(numbers: NDArray[np.int64]) -> bytes:
    """Return numbers above zero in Elias's gamma code, all unary halves before all binary halves."""
    if not numbers.size:
        return b""
    widths = np.frexp(numbers.astype(np.float64))[1] - 1  # floor of log2
    unary = np.zeros(int(widths.sum()) + numbers.size, np.uint8)
    unary[np.cumsum(widths + 1) - 1] = 1
    ends = np.cumsum(widths)
    places = np.arange(int(ends[-1])) - np.repeat(ends - widths, widths)
    binary = (np.repeat(numbers, widths) >> (np.repeat(widths, widths) - 1 - places)) & 1
    return np.packbits(np.concatenate([unary, binary.astype(np.uint8)])).tobytes()


def ungamma(data: bytes, count: int) -> tuple[NDArray[np.int64], bytes]:
    """Return `count` numbers and the bytes behind them; inverse of `gamma`."""
    if not count:
        return np.zeros(0, np.int64), data
    stream = np.unpackbits(np.frombuffer(data, np.uint8))
    stops = np.flatnonzero(stream)[:count]
    widths = np.diff(stops, prepend=-1) - 1
    ends = np.cumsum(widths)
    binary = stream[stops[-1] + 1 : stops[-1] + 1 + ends[-1]].astype(np.int64)
    places = np.arange(int(ends[-1])) - np.repeat(ends - widths, widths)
    weights = binary << (np.repeat(widths, widths) - 1 - places)
    sums = np.concatenate([[0], np.cumsum(weights)])
    numbers = (1 << widths) + sums[ends] - sums[ends - widths]
    return numbers, data[-(-(int(stops[-1]) + 1 + int(ends[-1])) // 8) :]


@dataclass(frozen=True)
class Blockwise:
    """NVFlare's filters `blockwise8`, `float4` and `normfloat4`: bitsandbytes, here on the CPU.

    Sent are the codes, a float32 maximum each block (4,096 values at 8 bits, 64 at 4) and the table of codes.
    NVFlare sends a table with each array; here there is one.
    """

    kind: str  # "blockwise8", "fp4" or "nf4"

    def encode(self, vector: Vector) -> bytes:
        """Return table, maxima and codes."""
        torch, functional = self._modules()
        tensor = torch.from_numpy(np.ascontiguousarray(vector))
        if self.kind == "blockwise8":
            codes, state = functional.quantize_blockwise(tensor)
        else:
            codes, state = functional.quantize_4bit(tensor, quant_type=self.kind)
        return b"".join(bytes(part.numpy().tobytes()) for part in (state.code, state.absmax, codes))

    def decode(self, data: bytes, count: int) -> Vector:
        """Return each code's value times its block's maximum."""
        torch, functional = self._modules()
        table_size, block = (256, 4096) if self.kind == "blockwise8" else (16, 64)
        number = -(-count // block)
        table = torch.from_numpy(np.frombuffer(data, np.float32, table_size).copy())
        absmax = torch.from_numpy(np.frombuffer(data, np.float32, number, 4 * table_size).copy())
        codes = torch.from_numpy(np.frombuffer(data, np.uint8, offset=4 * (table_size + number)).copy())
        if self.kind == "blockwise8":
            values = functional.dequantize_blockwise(codes, absmax=absmax, code=table, blocksize=block)
        else:
            state = functional.QuantState(absmax, torch.Size([count]), table, block, self.kind, torch.float32)
            values = functional.dequantize_4bit(codes.reshape(-1, 1), state)
        return np.asarray(values.numpy().ravel())

    @staticmethod
    def _modules() -> tuple[Any, Any]:
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
        return require("torch", "torch"), require("bitsandbytes.functional", "bitsandbytes")


@dataclass(frozen=True)
class TopK:
    """The entries of largest size, as float32 with int32 indices, or as float16 behind a bitmap."""

    density: float
    bitmap: bool

    def encode(self, vector: Vector) -> bytes:
        """Return where, then what."""
        kept = max(1, round(self.density * vector.size))
        places = np.sort(np.argpartition(np.abs(vector), -kept)[-kept:])
        if not self.bitmap:
            return places.astype(np.int32).tobytes() + vector[places].tobytes()
        mask = np.zeros(vector.size, np.bool_)
        mask[places] = True
        return np.packbits(mask).tobytes() + vector[places].astype(np.float16).tobytes()

    def decode(self, data: bytes, count: int) -> Vector:
        """Return the kept entries among zeros."""
        values = np.zeros(count, np.float32)
        if self.bitmap:
            size = -(-count // 8)
            places = np.flatnonzero(np.unpackbits(np.frombuffer(data, np.uint8, size), count=count))
            values[places] = np.frombuffer(data, np.float16, offset=size)
        else:
            half = len(data) // 2
            values[np.frombuffer(data[:half], np.int32)] = np.frombuffer(data[half:], np.float32)
        return values


def _qsgd(knob: float) -> Qsgd:
    """Return QSGD with ``|knob|`` levels: of the whole vector's norm if negative, else in buckets of 512."""
    return Qsgd(int(abs(knob)), 0 if math.copysign(1, knob) < 0 else 512)


DENSITIES = (0.001, 0.003, 0.01, 1 / 64, 0.03, 0.1, 0.2, 0.4)
LEVELS = (
    Peer("QSGD, Elias (transcribed)", _qsgd, (-1, -8, -64, 1, 4, 16, 64, 256), "levels, of a bucket or all", 4),
    Peer("QSGD, maximum (transcribed)", lambda s: Qsgd(int(s), 512, peak=True), (1, 2, 4, 8, 16, 64), "levels", 1),
    Peer("NVFlare 8 bits (bitsandbytes)", lambda _: Blockwise("blockwise8"), (8,), "bits", 8),
    Peer("NVFlare fp4 (bitsandbytes)", lambda _: Blockwise("fp4"), (4,), "bits"),
    Peer("NVFlare nf4 (bitsandbytes)", lambda _: Blockwise("nf4"), (4,), "bits", 4),
    Peer("top-k, float32 + int32", lambda share: TopK(share, bitmap=False), DENSITIES, "density", 1 / 64),
    Peer("top-k, float16 + bitmap", lambda share: TopK(share, bitmap=True), DENSITIES, "density"),
)
