"""The peers: other codecs for a float32 vector, each behind the same two calls.

Bytes are those that a peer would send: levels packed as it packs them, with its scales and tables. Headers and
checksums are counted for fedkit, but not for peers. Codecs that are in no installable package are transcribed from
their papers, in numpy or torch, and their names say so.
"""

from __future__ import annotations

from benchmarks.peers.base import Coder, Peer
from benchmarks.peers.floats import FLOATS
from benchmarks.peers.levels import LEVELS
from benchmarks.peers.rotation import ROTATIONS

__all__ = ["PEERS", "Coder", "Peer"]

PEERS: tuple[Peer, ...] = (*ROTATIONS, *LEVELS, *FLOATS)
