"""The peers: other codecs for a vector of float32, each through the same two calls.

Bytes are those a peer would send: levels packed as it packs them, with its scales and tables. Headers and
checksums are not counted for peers; for fedkit they are. What lives in no package that installs is transcribed
from its paper, in numpy or torch, and its name says so.
"""

from __future__ import annotations

from benchmarks.peers.base import Coder, Peer
from benchmarks.peers.floats import FLOATS
from benchmarks.peers.levels import LEVELS
from benchmarks.peers.rotation import ROTATIONS

__all__ = ["PEERS", "Coder", "Peer"]

PEERS: tuple[Peer, ...] = (*ROTATIONS, *LEVELS, *FLOATS)
