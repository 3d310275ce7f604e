"""The client half of FL-TAC: one message holds the adapters of all tasks of the client.

An app tells its tasks apart, and orders them in the same way each round, as *slots*: `split_slots` gives the
adapter that each starts from, `join_slots` puts the trained ones together. Nobody else knows what a slot is for.

Symbols and deviations: `fedkit.aggregation.cluster`.
"""

from __future__ import annotations

from typing import ClassVar

from fedkit.aggregation.slots import count_slots, join_slots, split_slots
from fedkit.arrays import NamedArrays

from .base import Coded, Job, UpdateMod

__all__ = ["TacMod", "join_slots", "split_slots"]


class TacMod(UpdateMod):
    """Turns the reply into the coded update of every slot. The server needs `fedkit.strategies.Tac`."""

    scheme: ClassVar[str] = "tac"

    def prepare(self, job: Job) -> NamedArrays:
        """Return what was sent; of a single slot the plain adapter, for apps that know no slots."""
        return job.sent if count_slots(job.sent) > 1 else split_slots(job.sent, 1)[0]

    def start_of(self, local: NamedArrays, given: NamedArrays) -> NamedArrays:
        """Return the adapters that the app's slots started from, named as the app's are."""
        starts = split_slots(given, count_slots(local))
        return join_slots(starts) if "slot-0" in {name.partition("/")[0] for name in local} else starts[0]

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return the update of all slots as one frame, and say how many they are."""
        num_slots = count_slots(update)
        slots = join_slots(split_slots(update, num_slots))
        return Coded(job.instructions.codec.encode(slots, rng=job.rng), options={"num-slots": num_slots})
