"""What every mod does: frame → arrays → the app's training → update → frame."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from flwr.app import Context, Message, MessageType, RecordDict

from fedkit.arrays import NamedArrays, check_finite, check_same_schema, subtract
from fedkit.codec.wire import decode_snapshot
from fedkit.errors import FedkitError
from fedkit.flower import ClientAppCallable, refusal
from fedkit.memory import ClientMemory
from fedkit.message import (
    FEDKIT,
    Instructions,
    Report,
    client_id,
    frame_record,
    from_arrays,
    read_frame,
    read_instructions,
    read_scheme,
    report_record,
    to_arrays,
)


class UpdateMod(ABC):
    """The client half of a scheme, as a Flower mod.

    The app around it sees ordinary arrays, in and out. Messages of another scheme, and of a strategy that is
    not fedkit's, pass untouched. A mod has no options, for the server decides, and no state, for a ClientApp
    lives for one message.
    """

    scheme: ClassVar[str]

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Return the app's reply with its update coded, or an error reply that says why there is none."""
        if read_scheme(message) != self.scheme:
            return call_next(message, context)
        try:
            instructions = read_instructions(message)
            sent = decode_snapshot(read_frame(message.content))
            memory = ClientMemory(context.state, self.scheme, like=sent)
            _replace_arrays(message.content, sent)
            if message.metadata.message_type != MessageType.TRAIN:
                return call_next(message, context)
            memory.settle(instructions.accepted)
            reply = call_next(message, context)
            return reply if reply.has_error() else self._coded(reply, sent, instructions, memory, context)
        except FedkitError as error:
            return refusal(f"{type(error).__name__}: {error}", reply_to=message)

    @abstractmethod
    def upload(self, update: NamedArrays, instructions: Instructions, memory: ClientMemory) -> bytes | None:
        """Return the frame to send, None to skip. `memory` is settled."""

    def _coded(
        self,
        reply: Message,
        sent: NamedArrays,
        instructions: Instructions,
        memory: ClientMemory,
        context: Context,
    ) -> Message:
        local = _single_arrays(reply.content)
        check_same_schema(local, like=sent)
        check_finite(local)
        frame = self.upload(subtract(local, sent), instructions, memory)
        (key,) = reply.content.array_records
        if frame is None:
            del reply.content[key]
        else:
            reply.content[key] = frame_record(frame)
        reply.content[FEDKIT] = report_record(Report(client_id(context), memory.digest, frame is None))
        if frame is not None:
            memory.stage(frame)
        return reply


def _replace_arrays(content: RecordDict, arrays: NamedArrays) -> None:
    (key,) = content.array_records
    content[key] = from_arrays(arrays)


def _single_arrays(content: RecordDict) -> NamedArrays:
    records = list(content.array_records.values())
    if len(records) != 1:
        raise FedkitError(f"the app's reply: expected one ArrayRecord, got {len(records)}.")
    return to_arrays(records[0])
