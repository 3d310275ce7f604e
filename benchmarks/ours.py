"""fedkit's own codecs, as the benchmarks measure them: whole frames, header and checksum included."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from benchmarks.peers.base import Peer, Vector
from fedkit.arrays import NamedArrays, flatten, unflatten
from fedkit.codec.baselines import Blocks, Qsgd, Sign
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.codec.rotation import Eden
from fedkit.codec.sparsify import TopK
from fedkit.codec.wire import Codec, decode, open_frame


@dataclass(frozen=True)
class Fedkit:
    """One of fedkit's codecs on vectors that stand for arrays; with no `like`, for one array."""

    codec: Codec
    like: NamedArrays = field(default_factory=dict)

    def encode(self, vector: Vector) -> bytes:
        """Return the frame; a quantizer that draws draws the same each time."""
        update = unflatten(vector, like=self._like(vector.size))
        return self.codec.encode(update, rng=np.random.default_rng(0))

    def decode(self, data: bytes, count: int) -> Vector:
        """Return the arrays of the frame, one after the other."""
        return flatten(decode(data, like=self._like(count)))

    def ideal_bits(self, data: bytes, count: int) -> float:
        """Return the order-0 entropy of the levels and the mask in a frame."""
        return open_frame(data, like=self._like(count)).ideal_bits()

    def _like(self, count: int) -> NamedArrays:
        return self.like or {"values": np.empty(count, np.float32)}


MAIN = "fedkit"  # the one that the comparison is about
RATES = (0.05, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0)
BITS = (2, 3, 4, 5, 6, 8)
OURS: tuple[Peer, ...] = (
    Peer(MAIN, lambda rate: Fedkit(Codec(EntropyConstrained(rate))), RATES, "bits", 1.0),
    Peer("fedkit, zero mid-tread", lambda b: Fedkit(Codec(ZeroMidTread(int(b), int(b)))), BITS, "bits"),
    Peer("fedkit, AQUILA as published", lambda _: Fedkit(Codec(AquilaMidTread())), (1,), "bits", 1),
    Peer("fedkit, blocks", lambda bits: Fedkit(Codec(Blocks(int(bits)))), BITS, "bits"),
    Peer("fedkit, EDEN", lambda bits: Fedkit(Codec(Eden(int(bits)))), (1, 2, 3, 4), "bits", 1),
    Peer("fedkit, QSGD", lambda bits: Fedkit(Codec(Qsgd(int(bits)))), BITS, "bits"),
    Peer("fedkit, sign", lambda _: Fedkit(Codec(Sign())), (1,), "bits"),
    Peer(
        "fedkit, top-k", lambda share: Fedkit(Codec(sparsifier=TopK(share))), (0.003, 0.01, 0.03, 0.1), "density"
    ),
)
