"""What the server sends: changes that bring every node to the same arrays, or all arrays each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from fedkit.arrays import NamedArrays
from fedkit.broadcast import Broadcast, snapshot_parcel
from fedkit.codec.wire import Codec
from fedkit.message import Parcel


class Downlink:
    """Codes what nodes are sent; without a `codec`, all arrays in float32.

    Parameters
    ----------
    codec : Codec, optional
        Of the changes.
    initial : Codec
        Of the initial arrays.
    seed : int
        Of codecs that draw.
    """

    def __init__(self, codec: Codec | None, initial: Codec, seed: int) -> None:
        self.codec, self.initial, self.seed = codec, initial, seed
        self.broadcast: Broadcast | None = None

    def begin(self, params: NamedArrays) -> NamedArrays:
        """Return the initial arrays as clients will rebuild them."""
        if self.codec is None:
            return params
        self.broadcast = Broadcast.begin(self.codec, params, self.initial, np.random.default_rng([self.seed, 0]))
        return self.broadcast.arrays

    def advance(self, params: NamedArrays, server_round: int) -> NamedArrays:
        """Return the server's new arrays as clients will rebuild them."""
        if self.broadcast is None:
            return params
        self.broadcast = self.broadcast.advance(params, np.random.default_rng([self.seed, server_round]))
        return self.broadcast.arrays

    def parcels(
        self, sent: Mapping[int, NamedArrays], versions: Mapping[int, bytes]
    ) -> Iterator[tuple[int, Parcel]]:
        """Yield each node's parcel; `versions` are those that nodes said they hold."""
        snapshots: dict[int, Parcel] = {}  # nodes that are sent the same arrays share one
        for node_id, arrays in sent.items():
            if self.broadcast is not None:
                yield node_id, self.broadcast.parcel_for(versions.get(node_id))
                continue
            if id(arrays) not in snapshots:
                snapshots[id(arrays)] = snapshot_parcel(arrays)
            yield node_id, snapshots[id(arrays)]
