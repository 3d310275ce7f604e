"""The client half of FL-TAC: one message holds the adapters of all tasks of the client.

An app tells its tasks apart, and orders them in the same way each round, as *slots*: `split_slots` gives the
adapter that each starts from, `join_slots` puts the trained ones together. Nobody else knows what a slot is for.
`fedkit.clients.slots.train_slots` does that for a PEFT model, which never holds more than one adapter.

Slots are coded as they are or, if the server says so, as AQUILA's innovations, or under a mask. It is one for all
slots of all clients in a round, unlike SAFARI's: adapters under masks of their own are hard to compare.

Symbols and deviations: `fedkit.aggregation.cluster`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Final

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedkit.aggregation.evidence import FEATURES
from fedkit.aggregation.slots import count_slots, join_slots, split_slots
from fedkit.arrays import NamedArrays
from fedkit.codec.sparsify import random_mask
from fedkit.errors import FedkitError
from fedkit.message import CODING, Instructions
from fedkit.ordinary import Beside

from .aquila import AquilaMod
from .base import Coded, Job, UpdateMod

__all__ = ["TacMod", "join_slots", "split_slots"]


NONE: Final = (
    "the server tells slots apart by features, and the app's reply holds none. "
    "Train with `train_slots(model, received, trainings, Features(message))`."
)


class Plainly(UpdateMod):
    """Codes slots as they are."""

    scheme: ClassVar[str] = "tac"

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return all of them."""
        return Coded(job.instructions.codec.encode(update, rng=job.rng))


class Masked(UpdateMod):
    """Codes the entries of slots that all clients send in a round."""

    scheme: ClassVar[str] = "tac"

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return these entries of every slot."""
        instructions = job.instructions
        rng = np.random.default_rng([int(instructions.options["seed"]), instructions.server_round])
        one = random_mask(split_slots(update, 1)[0], float(instructions.options["density"]), rng)
        mask = {name: one[name.partition("/")[2]] for name in update}
        return Coded(instructions.codec.encode(update, mask=mask, rng=job.rng))


_CODINGS: Final[Mapping[str, UpdateMod]] = {"": Plainly(), "masked": Masked(), "aquila": AquilaMod()}


class TacMod(UpdateMod):
    """Turns the reply into the coded update of every slot. The server needs `fedkit.strategies.Tac`."""

    scheme: ClassVar[str] = "tac"

    def rewinds(self, instructions: Instructions) -> bool:
        """Return what the mod says that codes the slots."""
        return _coding(instructions).rewinds(instructions)

    def remembers_as(self, instructions: Instructions) -> str:
        """Return the name of the scheme that codes the slots."""
        return _coding(instructions).scheme

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
        coded = _coding(job.instructions).code(join_slots(split_slots(update, num_slots)), job)
        return replace(coded, options={"num-slots": num_slots})

    def _code_reply(self, content: RecordDict, given: NamedArrays, beside: Beside, job: Job) -> Coded:
        """Take the slots' features out of the app's reply, too; they go up if the server asked for them."""
        record = content.pop(FEATURES, None)
        coded, asked = super()._code_reply(content, given, beside, job), job.instructions.options.get(FEATURES)
        if coded.frame is None or not asked or (asked == "may" and record is None):
            return coded
        if not isinstance(record, ConfigRecord) or not isinstance(text := record.get("means"), str):
            raise FedkitError(NONE)
        return replace(coded, options={**coded.options, FEATURES: text})


def _coding(instructions: Instructions) -> UpdateMod:
    """Return the mod that codes slots as the server asks."""
    name = str(instructions.options.get(CODING, ""))
    if name not in _CODINGS:
        raise FedkitError(f"the server asks for the coding {name!r}, which this fedkit lacks. Update it.")
    return _CODINGS[name]
