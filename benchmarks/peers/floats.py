"""Compressors of arrays of floats: zstd and blosc2 on float16, blosc2 on shortened float32, SZ3, ZFP, pcodec.

The parameter of the last three is an error: a tolerance, or a step, in units of the vector's root mean square.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.peers.base import Peer, Vector, require

STEPS = (6.0, 4.0, 3.0, 2.5, 2.2, 2.0, 1.8, 1.6, 1.5, 1.3, 1.1, 0.9, 0.7, 0.5, 0.35, 0.25, 0.12, 0.06, 0.03, 0.015)
_STEP = struct.Struct("<f")


def rms(vector: Vector) -> float:
    """Return the root mean square."""
    return float(np.sqrt(np.mean(np.square(vector, dtype=np.float64))))


@dataclass(frozen=True)
class Zstd:
    """float16, then zstandard at a level."""

    level: int

    def encode(self, vector: Vector) -> bytes:
        """Return the compressed halves."""
        module = require("zstandard", "zstandard")
        return bytes(module.ZstdCompressor(level=self.level).compress(vector.astype(np.float16).tobytes()))

    def decode(self, data: bytes, count: int) -> Vector:
        """Return the halves as float32."""
        plain = require("zstandard", "zstandard").ZstdDecompressor().decompress(data)
        return np.frombuffer(plain, np.float16).astype(np.float32)


@dataclass(frozen=True)
class Blosc:
    """blosc2 with shuffled bits and zstd: on float16, or on float32 with fewer bits of mantissa."""

    mantissa: int  # bits kept; 0: float16

    def encode(self, vector: Vector) -> bytes:
        """Return the compressed chunk."""
        blosc2 = require("blosc2", "blosc2")
        filters, meta = [blosc2.Filter.BITSHUFFLE], [0]
        if self.mantissa:
            filters, meta = [blosc2.Filter.TRUNC_PREC, *filters], [self.mantissa, *meta]
        values = vector if self.mantissa else vector.astype(np.float16)
        codec = blosc2.Codec.ZSTD
        return bytes(
            blosc2.compress2(
                values, codec=codec, typesize=values.itemsize, filters=filters, filters_meta=meta, nthreads=1
            )
        )

    def decode(self, data: bytes, count: int) -> Vector:
        """Return the values as float32."""
        plain = require("blosc2", "blosc2").decompress2(data, nthreads=1)
        return np.frombuffer(plain, np.float32 if self.mantissa else np.float16).astype(np.float32)


@dataclass(frozen=True)
class Sz3:
    """SZ3 with an absolute error bound."""

    tolerance: float

    def encode(self, vector: Vector) -> bytes:
        """Return SZ3's own bytes."""
        module = require("pysz", "pysz")
        config = module.szConfig()
        config.errorBoundMode = module.szErrorBoundMode.ABS
        config.absErrorBound = self.tolerance * rms(vector)
        return bytes(module.sz.compress(np.ascontiguousarray(vector), config)[0].tobytes())

    def decode(self, data: bytes, count: int) -> Vector:
        """Return the values."""
        module = require("pysz", "pysz")
        values, _ = module.sz.decompress(np.frombuffer(data, np.uint8), np.float32, (count,))
        return np.asarray(values)


@dataclass(frozen=True)
class Zfp:
    """ZFP in one dimension with an absolute tolerance."""

    tolerance: float

    def encode(self, vector: Vector) -> bytes:
        """Return ZFP's own bytes."""
        module = require("zfpy", "zfpy")
        return bytes(module.compress_numpy(np.ascontiguousarray(vector), tolerance=self.tolerance * rms(vector)))

    def decode(self, data: bytes, count: int) -> Vector:
        """Return the values."""
        return np.asarray(require("zfpy", "zfpy").decompress_numpy(data))


@dataclass(frozen=True)
class Pcodec:
    """Round to multiples of a step, then pcodec: what its users do who may lose precision."""

    step: float

    def encode(self, vector: Vector) -> bytes:
        """Return the step and pcodec's own bytes."""
        step = self.step * rms(vector)
        return _STEP.pack(step) + encode_levels(np.rint(vector / np.float32(step)).astype(np.int16))

    def decode(self, data: bytes, count: int) -> Vector:
        """Return level times step."""
        (step,) = _STEP.unpack_from(data)
        levels = np.asarray(decode_levels(data[_STEP.size :]), np.float32)
        return levels * np.float32(step)


def encode_levels(levels: Any) -> bytes:
    """Return int16 levels as pcodec's bytes."""
    pcodec, standalone = require("pcodec", "pcodec"), require("pcodec.standalone", "pcodec")
    return bytes(standalone.simple_compress(levels, pcodec.ChunkConfig()))


def decode_levels(data: bytes) -> Any:
    """Return the levels; inverse of `encode_levels`."""
    return require("pcodec.standalone", "pcodec").simple_decompress(data)


FLOATS = (
    Peer("float16 + zstd", lambda level: Zstd(int(level)), (3,), "level", 3),
    Peer("float16 + blosc2", lambda _: Blosc(0), (16,), "bits", 16),
    Peer("float32, fewer mantissa bits + blosc2", lambda m: Blosc(int(m)), (1, 2, 3, 5, 8), "mantissa bits"),
    Peer("SZ3", Sz3, STEPS, "tolerance / rms", 1.0),
    Peer("ZFP", Zfp, STEPS, "tolerance / rms", 1.0),
    Peer("rounding + pcodec", Pcodec, STEPS, "step / rms", 1.5),
)
