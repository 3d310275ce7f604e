"""The client half of FL-TAC: one message holds the adapters of all tasks of the client.

The app has one *slot* for the adapter of each of its tasks, in the same order in every round. Only the app knows
which task a slot is for. `split_slots` returns the adapters to start from, and `join_slots` puts the trained ones
together. `fedkit.clients.slots.train_slots` does both for a PEFT model that never holds more than one adapter.

Slots are encoded as they are or, if the server says so, as AQUILA's innovations or under a mask. Unlike SAFARI's,
this mask is the same for all slots of all clients in a round: adapters under masks of their own are hard to
compare.

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
    """Encodes the updates of slots as they are."""

    scheme: ClassVar[str] = "tac"

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return a frame with the updates of all slots."""
        return Coded(job.instructions.codec.encode(update, rng=job.rng))


class Masked(UpdateMod):
    """Encodes the updates of slots under the mask that all clients share in a round."""

    scheme: ClassVar[str] = "tac"

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return a frame with the entries of every slot that the mask keeps."""
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
        """Return what the mod that encodes the slots returns."""
        return _coding(instructions).rewinds(instructions)

    def remembers_as(self, instructions: Instructions) -> str:
        """Return the name of the scheme that encodes the slots."""
        return _coding(instructions).scheme

    def prepare(self, job: Job) -> NamedArrays:
        """Return what was sent; for a single slot the plain adapter, for apps that do not use slots."""
        return job.sent if count_slots(job.sent) > 1 else split_slots(job.sent, 1)[0]

    def start_of(self, local: NamedArrays, given: NamedArrays) -> NamedArrays:
        """Return the adapters that the app's slots started from, under the names that the app uses."""
        starts = split_slots(given, count_slots(local))
        return join_slots(starts) if "slot-0" in {name.partition("/")[0] for name in local} else starts[0]

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return the updates of all slots as one frame, with the number of slots."""
        num_slots = count_slots(update)
        coded = _coding(job.instructions).code(join_slots(split_slots(update, num_slots)), job)
        return replace(coded, options={"num-slots": num_slots})

    def _code_reply(self, content: RecordDict, given: NamedArrays, beside: Beside, job: Job) -> Coded:
        """Also take the slots' features out of the app's reply, and report them if the server asked for them."""
        record = content.pop(FEATURES, None)
        coded, asked = super()._code_reply(content, given, beside, job), job.instructions.options.get(FEATURES)
        if coded.frame is None or not asked or (asked == "may" and record is None):
            return coded
        if not isinstance(record, ConfigRecord) or not isinstance(text := record.get("means"), str):
            raise FedkitError(NONE)
        return replace(coded, options={**coded.options, FEATURES: text})


def _coding(instructions: Instructions) -> UpdateMod:
    """Return the mod that encodes slots in the way that the server asks for."""
    name = str(instructions.options.get(CODING, ""))
    if name not in _CODINGS:
        raise FedkitError(f"the server asks for the coding {name!r}, which this fedkit lacks. Update it.")
    return _CODINGS[name]
