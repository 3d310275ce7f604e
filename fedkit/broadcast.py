"""The downlink: server and clients rebuild the same arrays from coded changes.

The server never sends the arrays that it computed. It codes the change from the arrays that the clients have,
decodes that change itself, and continues with the arrays that the clients can rebuild. What coding lost is carried
into the next change, so that nothing is lost for good. The arrays after each change are a *version*, named by the
running hash of its frames:

================================  ===========================================
the node said it holds            it is sent
================================  ===========================================
a version still remembered        the changes since
nothing, or a version too old     all changes from the first, whose frame includes names and shapes;
                                  a dense snapshot once that is smaller
================================  ===========================================

A node that is ahead of the version it said it holds (its reply was lost) skips the changes it has. A node that has
none of these versions says so with an error reply, and is sent everything next time.
"""

from __future__ import annotations

import hashlib
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Final

import numpy as np

from fedkit.arrays import NamedArrays, add, flatten, num_values, subtract, zeros_like
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.snapshot import decode_snapshot, encode_snapshot
from fedkit.codec.sparsify import Nonzero
from fedkit.codec.wire import Codec, decode
from fedkit.errors import CodecError, VersionError
from fedkit.memory import GENESIS, chain
from fedkit.parcel import Parcel

TWO_BITS: Final = Codec(EntropyConstrained(2.0))
"""Loses 5 to 10 % of the squared norm of each change, which is sent later."""
ALL_NONZERO: Final = Codec(sparsifier=Nonzero())
"""Lossless; leaves out zeros, such as the half of all LoRA factors that is initially zero."""

_ARRAYS: Final = "received.arrays"
_VERSION: Final = "received.version"


@dataclass(frozen=True, slots=True)
class Broadcast:
    """The arrays that the clients can rebuild, and how to bring each client there; a plain value.

    Parameters
    ----------
    codec : Codec
        Of the changes.
    arrays : NamedArrays
        The arrays of the newest version.
    residual : NamedArrays
        What coding lost so far: the server's own arrays − `arrays`.
    frames : sequence of bytes
        The last changes, oldest first.
    versions : sequence of bytes
        The version before each of `frames`, and the newest.
    """

    codec: Codec
    arrays: NamedArrays
    residual: NamedArrays
    frames: Sequence[bytes]
    versions: Sequence[bytes]

    @classmethod
    def begin(cls, codec: Codec, initial: NamedArrays, first: Codec, rng: np.random.Generator) -> Broadcast:
        """Return the first version: `initial` as coded by `first`. What that loses is not carried on."""
        frame = encode_snapshot(initial, first, rng=rng)
        arrays = decode_snapshot(frame)
        return cls(codec, arrays, zeros_like(arrays), (frame,), (GENESIS, chain(GENESIS, frame)))

    @property
    def version(self) -> bytes:
        """The newest version."""
        return self.versions[-1]

    def advance(self, params: NamedArrays, rng: np.random.Generator) -> Broadcast:
        """Return the next version, for the server's step from `arrays` to `params`.

        Raises
        ------
        CodecError
            If an entry is NaN or infinite.
        """
        change = add(subtract(params, self.arrays), self.residual)
        frame = self.codec.encode(change, rng=rng)
        coded = decode(frame, like=change)
        frames, versions = [*self.frames, frame], [*self.versions, chain(self.version, frame)]
        while len(frames) > 1 and sum(map(len, frames)) > 4 * num_values(params):  # a snapshot is smaller
            del frames[0], versions[0]
        return replace(
            self,
            arrays=add(self.arrays, coded),
            residual=subtract(change, coded),
            frames=frames,
            versions=versions,
        )

    def parcel_for(self, held: bytes | None) -> Parcel:
        """Return what to send to a node that holds the version `held`, None if it holds none."""
        digest = digest_of(self.arrays)
        if held in self.versions and held != GENESIS:
            at = self.versions.index(held)
        elif self.versions[0] == GENESIS:
            at = 0
        else:
            return snapshot_parcel(self.arrays, self.version)
        return Parcel(self.versions[at], self.version, digest, tuple(self.frames[at:]))


def snapshot_parcel(arrays: NamedArrays, version: bytes = GENESIS) -> Parcel:
    """Return a parcel of one dense snapshot; without a `version`, the node need not remember it."""
    return Parcel(GENESIS, version, digest_of(arrays), (encode_snapshot(arrays),))


def receive(parcel: Parcel, state: MutableMapping[str, bytes]) -> NamedArrays:
    """Return the arrays of a parcel's version, and remember them in the client's state (`fedkit.state`).

    Raises
    ------
    VersionError
        If this node holds no version that the changes start from, or rebuilt other arrays than the server.
    CodecError
        If a frame is damaged.
    """
    versions = list(accumulate(parcel.frames, chain, initial=parcel.base))
    if parcel.base == GENESIS:
        versions[-1] = parcel.version  # a snapshot replaces all changes before it
    held, arrays = held_version(state), _load(state)
    at = versions.index(held) if arrays is not None and held in versions else None
    if versions[-1] != parcel.version or (at is None and parcel.base != GENESIS):
        forget(state)
        raise VersionError("this node does not hold the version that the server's changes start from.")
    if at is None or arrays is None:
        at, arrays = 1, decode_snapshot(parcel.frames[0])
    for frame in parcel.frames[at:]:
        arrays = add(arrays, decode(frame, like=arrays))
    if digest_of(arrays) != parcel.digest:
        forget(state)
        raise VersionError("this node rebuilt other arrays than the server has.")
    if parcel.version == GENESIS:
        forget(state)
    else:
        state[_ARRAYS], state[_VERSION] = encode_snapshot(arrays), parcel.version
    return arrays


def held_version(state: MutableMapping[str, bytes]) -> bytes:
    """Return the version that this client holds; GENESIS if none."""
    return state.get(_VERSION, GENESIS)


def forget(state: MutableMapping[str, bytes]) -> None:
    """Drop what this client has received."""
    for key in (_ARRAYS, _VERSION):
        state.pop(key, None)


def digest_of(arrays: NamedArrays) -> bytes:
    """Return 8 bytes that depend on every bit of every value."""
    return hashlib.blake2b(flatten(arrays).astype("<f4").tobytes(), digest_size=8).digest()


def _load(state: MutableMapping[str, bytes]) -> NamedArrays | None:
    if _ARRAYS in state:
        try:
            return decode_snapshot(state[_ARRAYS])
        except CodecError:
            forget(state)
    return None
