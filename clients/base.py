"""What every mod does: received frames → arrays → the app's training → update → frame."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from flwr.app import Context, Message, MessageType, RecordDict

from fedkit.arrays import NamedArrays, check_finite, check_same_schema, subtract
from fedkit.broadcast import held_version, receive
from fedkit.config import Scalar
from fedkit.errors import FedkitError
from fedkit.flower import ClientAppCallable, refusal
from fedkit.memory import GENESIS, rewind
from fedkit.message import (
    LORA,
    SUBMODEL,
    Instructions,
    Report,
    client_id,
    frame_record,
    read_instructions,
    read_scheme,
    write_report,
)
from fedkit.ordinary import Beside, Ordinary, pack_values, split
from fedkit.parcel import read_parcel
from fedkit.row_masks import ROWS_SEED, RowDraw
from fedkit.state import ClientState, State
from fedkit.submodels import take

from .profiles import described
from .shares import check_rested, completed, keep, shared


@dataclass(frozen=True, slots=True)
class Job:
    """What a mod needs to process one message."""

    client_id: str
    sent: NamedArrays  # the arrays that the server sent, rebuilt
    version: bytes  # of `sent`
    instructions: Instructions
    state: State  # what this client keeps between messages

    @property
    def rng(self) -> np.random.Generator:
        """Return a random generator for this message: another in each round, the same if a round is repeated."""
        return np.random.default_rng([self.instructions.server_round, zlib.crc32(self.client_id.encode())])

    @property
    def rows(self) -> RowDraw | None:
        """Return which rows of the LoRA factors are trained and sent; None: all of them."""
        return RowDraw.from_options(self.instructions.options)

    def travelling(self, update: NamedArrays) -> NamedArrays:
        """Return the part of an update that is sent: its active rows, or all of it without a row mask."""
        return update if self.rows is None else take(update, self.rows.submodel(update))


@dataclass(frozen=True, slots=True)
class Coded:
    """What a mod sends to the server."""

    frame: bytes | None  # None: skip
    base: bytes = GENESIS  # digest of the memory that the frame adds to
    options: Mapping[str, Scalar] = field(default_factory=dict)  # what the strategy must know to decode it
    beside: bytes = b""  # values of the app's arrays that are not in the frame: `fedkit.ordinary`


class UpdateMod(ABC):
    """The client half of a scheme, as a Flower mod.

    The app gets and returns ordinary arrays. Messages of another scheme, or of a strategy that is not fedkit's,
    pass untouched. A mod has no options, since the server decides, and no state of its own, since a ClientApp
    lives for one message only.
    """

    scheme: ClassVar[str]

    def rewinds(self, instructions: Instructions) -> bool:
        """Return whether even a lost upload changes the scheme's state: see `fedkit.memory.rewind`."""
        return False

    def remembers_as(self, instructions: Instructions) -> str:
        """Return the scheme whose name the entries of the state begin with; by default this mod's."""
        return self.scheme

    def prepare(self, job: Job) -> NamedArrays:
        """Return the arrays that the app gets; by default those that were sent."""
        return job.sent

    def start_of(self, local: NamedArrays, given: NamedArrays) -> NamedArrays:
        """Return what the app's arrays are compared with; by default those that it was given."""
        return given

    @abstractmethod
    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return what to send for `update`, which is local − start (`start_of`)."""

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Return the app's reply with its update encoded, or an error reply that gives the reason."""
        if read_scheme(message) != self.scheme:
            return call_next(message, context)
        try:
            instructions = read_instructions(message)
            where = ClientState(context, instructions.experiment)
            state = where.load()
            if instructions.introduce:
                known = described(context) | _submodel(context, {})
                return _introduction(
                    message, Report(client_id(context), GENESIS, True, held_version(state), known)
                )
            parcel = read_parcel(message.content)
            sent = receive(parcel, state)
            lora = str(instructions.options.get(LORA, ""))
            rewinds = self.rewinds(instructions) or lora == "fedsa"
            if rewinds and message.metadata.message_type == MessageType.TRAIN:
                rewind(state, self.remembers_as(instructions), instructions.server_round)
            where.save(state)  # before training, which a full or read-only disk must not waste
            job = Job(client_id(context), sent, parcel.version, instructions, state)
            given = completed(self.prepare(job), lora, state, self.scheme)
            ordinary = Ordinary.unpack(instructions.ordinary)
            (key,) = message.content.array_records
            message.content[key] = record = ordinary.record(given)
            if ordinary.dtypes:
                given, _ = split(record, list(ordinary.beside))  # as the app sees them
            reply = call_next(message, context)
            if reply.has_content():
                coded = Coded(None)
                if message.metadata.message_type == MessageType.TRAIN:
                    coded = self._code_reply(reply.content, given, ordinary.beside, job)
                options = {**coded.options, **_submodel(context, instructions.options)}
                if job.rows is not None:
                    options[ROWS_SEED] = job.rows.seed
                report = Report(job.client_id, coded.base, coded.frame is None, job.version, options, coded.beside)
                write_report(reply.content, report)
                where.save(state)
        except FedkitError as error:
            return refusal(f"{type(error).__name__}: {error}", reply_to=message)
        return reply

    def _code_reply(self, content: RecordDict, given: NamedArrays, beside: Beside, job: Job) -> Coded:
        """Replace the arrays in the app's reply by a frame."""
        if len(content.array_records) != 1:
            raise FedkitError(f"the app's reply: expected one ArrayRecord, got {len(content.array_records)}.")
        ((key, record),) = content.array_records.items()
        local, own = split(record, list(beside))
        start = self.start_of(local, given)
        local = {name: local[name] for name in start} if local.keys() == start.keys() else local  # in any order
        check_same_schema(local, like=start)
        check_finite(local)
        lora = str(job.instructions.options.get(LORA, ""))
        update = subtract(*shared(local, start, lora))
        check_rested(update, job.rows)
        coded = self.code(update, job)
        keep(local, lora, job.state, self.scheme)
        if coded.frame is None:
            del content[key]
        else:
            content[key] = frame_record(coded.frame)
        return replace(coded, beside=pack_values(own.beside, beside))


def _introduction(message: Message, report: Report) -> Message:
    """Return the answer to a message that only asks which client this is."""
    content = RecordDict()
    write_report(content, report)
    return Message(content, reply_to=message)


def _submodel(context: Context, told: Mapping[str, Scalar]) -> dict[str, Scalar]:
    """Return what a report says of which part of the model this client holds: by its node config, or as told."""
    name = context.node_config.get(SUBMODEL, told.get(SUBMODEL))
    return {} if name is None else {SUBMODEL: str(name)}
