"""Slow, obvious twins of what clients remember: histories instead of digests, sums taken anew each time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate

import numpy as np
from flwr.app import Message, MessageType
from numpy.typing import NDArray

from fedkit.arrays import flatten
from fedkit.broadcast import _load, held_version
from fedkit.codec.wire import decode
from fedkit.memory import GENESIS, ClientMemory, Residual, chain
from fedkit.message import read_instructions
from fedkit.parcel import read_parcel
from tests.helpers.quadratic import LIKE
from tests.helpers.schedules.plan import MODS

History = tuple[bytes, ...]  # frames, in the order in which the server accepted them
Vector = NDArray[np.float32]


class ScheduleError(AssertionError):
    """An invariant does not hold."""


def check(holds: object, what: str) -> None:
    """Raise ScheduleError unless something holds."""
    if not holds:
        raise ScheduleError(what)


@lru_cache(maxsize=4096)
def values(frame: bytes) -> Vector:
    """Return what a frame adds."""
    return flatten(decode(frame, like=LIKE))


def total(history: History) -> Vector:
    """Return what all frames of a history add up to, one after the other."""
    result = np.zeros_like(flatten(LIKE))
    for frame in history:
        result = result + values(frame)
    return result


@dataclass(frozen=True)
class Held:
    """What a client must remember."""

    version: bytes = GENESIS  # of the arrays it received
    history: History = ()  # what it knows the server to have
    staged: bytes | None = None  # what the server may have besides
    epoch: int = 0  # a new one whenever it starts anew
    updates: NDArray[np.float64] | None = None  # the sum of all updates of this epoch; error feedback
    begun: int = 0  # the round that began last
    before: Held | None = None  # what it remembered then


class Clients:
    """What all clients must remember, and what everybody must have received."""

    def __init__(self, scheme: str) -> None:
        self.scheme = scheme
        self.epochs = 0
        self.arrays: dict[bytes, Vector] = {}  # the server's, by version
        self.sent: dict[int, Vector] = {}  # and by round, if they have no version
        self.histories: dict[bytes, History] = {GENESIS: ()}  # by digest
        self.epoch_of: dict[bytes, int] = {}  # of each frame

    def fresh(self) -> Held:
        """Return what a client remembers that starts anew."""
        self.epochs += 1
        return Held(epoch=self.epochs)

    def receives(self, held: Held, message: Message) -> Held | None:
        """Return what a client remembers once it has the arrays of a message; None if it must refuse it."""
        parcel = read_parcel(message.content)
        steps = list(accumulate(parcel.frames, chain, initial=parcel.base))
        if parcel.base != GENESIS and held.version not in steps:
            return None
        instructions = read_instructions(message)
        rewinds = MODS[self.scheme]().rewinds(instructions)  # schemes that keep what was lost
        if not rewinds or message.metadata.message_type != MessageType.TRAIN:
            return replace(held, version=parcel.version)
        before = held
        if held.begun == instructions.server_round and held.before is not None:
            before = held.before  # the server crashed: what came of this round does not count
        before = replace(before, begun=0, before=None)
        return replace(before, version=parcel.version, begun=instructions.server_round, before=before)

    def settles(self, held: Held, accepted: bytes) -> Held:
        """Return what a client remembers once it knows what the server accepted."""
        check(accepted in self.histories, "the server accepted what nobody sent")
        history = self.histories[accepted]
        if held.staged is not None and history == (*held.history, held.staged):
            return replace(held, history=history, staged=None)
        if history == held.history:
            return replace(held, staged=None)
        return replace(held, history=(), staged=None, epoch=self.fresh().epoch, updates=None)

    def trains(self, held: Held, message: Message, local: Mapping[str, Vector], frame: bytes | None) -> Held:
        """Return what a client remembers after training that ended at `local`, of which it sends `frame`."""
        if self.scheme == "safari":
            self.histories[chain(GENESIS, frame or b"")] = (frame or b"",)
            return held
        settled = self.settles(held, read_instructions(message).accepted)
        if frame is not None:
            grown = (*settled.history, frame)
            digest = GENESIS
            for part in grown:
                digest = chain(digest, part)
            self.histories[digest] = grown
            self.epoch_of[frame] = settled.epoch
        updates = settled.updates if settled.updates is not None else np.zeros(flatten(LIKE).size)
        updates = updates + (flatten(local) - self.given(settled, message))
        return replace(settled, staged=frame, updates=updates)

    def given(self, held: Held, message: Message) -> Vector:
        """Return the arrays that a client that holds this must train on."""
        if held.version == GENESIS:
            return self.sent[read_instructions(message).server_round]
        return self.arrays[held.version]

    def compare(self, held: Held, state: Mapping[str, bytes], name: str) -> None:
        """Check what a client really remembers against what it must."""
        state = dict(state)
        check(held_version(state) == held.version, f"client {name} holds another version")
        if held.version != GENESIS:
            arrays = _load(state)
            check(arrays is not None, f"client {name} holds no arrays")
            check(
                np.array_equal(flatten(arrays or {}), self.arrays[held.version]), f"client {name}: arrays differ"
            )
        if self.scheme == "safari":
            return
        kind = ClientMemory if self.scheme == "aquila" else Residual
        memory = kind(state, self.scheme, like=LIKE)
        check(self.histories.get(memory.digest) == held.history, f"client {name}: another history")
        check(memory._staged == held.staged, f"client {name}: another upload is staged")
        if self.scheme == "aquila":
            check(np.array_equal(flatten(memory.arrays), total(held.history)), f"client {name}: memory drifted")
        elif held.updates is not None:
            owed = held.updates - total(held.history)
            error = np.abs(flatten(memory.arrays) - owed).max()
            check(error <= 2e-6 * max(1.0, np.abs(held.updates).max()), f"client {name} owes another sum: {error}")
