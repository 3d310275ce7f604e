"""What the server sends: coded changes that bring all nodes to the same arrays, or all arrays every time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fedkit.arrays import NamedArrays, num_values
from fedkit.broadcast import ALL_NONZERO, Broadcast, snapshot_parcel
from fedkit.checkpoint import Tree
from fedkit.codec.wire import Codec, open_frame
from fedkit.errors import ConfigError
from fedkit.parcel import Parcel


class Downlink:
    """Encodes what nodes are sent; without a `codec`, all arrays in float32.

    Parameters
    ----------
    codec : Codec, optional
        For the changes of the arrays.
    initial : Codec
        For the initial arrays.
    seed : int
        For codecs that use random numbers.
    """

    def __init__(self, codec: Codec | None, initial: Codec, seed: int) -> None:
        if codec is None and initial != ALL_NONZERO:
            raise ConfigError("initial codes what a downlink begins with: expected a downlink, got None.")
        self.codec, self.initial, self.seed = codec, initial, seed
        self.broadcast: Broadcast | None = None
        self._snapshot = 0  # bytes of all arrays in float32

    def begin(self, params: NamedArrays) -> NamedArrays:
        """Return the initial arrays as clients will rebuild them."""
        self._snapshot = 4 * num_values(params)
        if self.codec is None:
            return params
        self.broadcast = Broadcast.begin(self.codec, params, self.initial, np.random.default_rng([self.seed, 0]))
        return self.broadcast.arrays

    def remember(self) -> Tree:
        """Return what `recall` needs after a restart."""
        b = self.broadcast
        return None if b is None else (dict(b.arrays), dict(b.residual), list(b.frames), list(b.versions))

    def recall(self, saved: Tree, params: NamedArrays) -> None:
        """Restore what `remember` returned."""
        self._snapshot = 4 * num_values(params)
        self.broadcast = None if saved is None or self.codec is None else Broadcast(self.codec, *saved)

    def advance(self, params: NamedArrays, server_round: int) -> NamedArrays:
        """Return the server's new arrays as clients will rebuild them."""
        if self.broadcast is None:
            return params
        self.broadcast = self.broadcast.advance(params, np.random.default_rng([self.seed, server_round]))
        return self.broadcast.arrays

    @property
    def versions(self) -> Sequence[bytes]:
        """The versions from which a node can be updated, oldest first; the newest version is the last."""
        return () if self.broadcast is None else self.broadcast.versions

    @property
    def typical_bytes(self) -> int:
        """How many bytes of frames a node is sent in a round, once it is up to date."""
        if self.broadcast is None:
            return self._snapshot
        return len(self.broadcast.frames[-1]) if len(self.broadcast.frames) > 1 else self._snapshot

    def parcels(
        self, sent: Mapping[int, NamedArrays], versions: Mapping[int, bytes]
    ) -> Iterator[tuple[int, Parcel, float]]:
        """Yield each node's parcel and the bits an ideal coder needs; `versions` are those that nodes hold."""
        snapshots: dict[int, Parcel] = {}  # shared by nodes that are sent the same arrays
        changes: dict[bytes | None, Parcel] = {}  # shared by nodes that hold the same version
        bits: dict[bytes, float] = {}  # by frame
        for node_id, arrays in sent.items():
            if self.broadcast is not None:
                held = versions.get(node_id)
                held = held if held in self.broadcast.versions else None  # what else it says makes no difference
                if held not in changes:
                    changes[held] = self.broadcast.parcel_for(held)
                parcel = changes[held]
            else:
                parcel = snapshots.get(id(arrays)) or snapshot_parcel(arrays)
                snapshots[id(arrays)] = parcel
            for frame in parcel.frames:
                if frame not in bits:
                    bits[frame] = open_frame(frame, like=arrays).ideal_bits()
            yield node_id, parcel, sum(bits[frame] for frame in parcel.frames)
