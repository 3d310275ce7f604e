"""The Grid wrapper that fedkit hands to Flower's own `start`: it counts what travels and applies the faults."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedkit.errors import ReplyError
from fedkit.faults import Faults
from fedkit.flower import GridWrapper, object_sizes
from fedkit.ledger import Direction, Entry, Ledger
from fedkit.message import SERVER_ROUND, read_report
from fedkit.sockets import SocketMeter


class RoundGrid(GridWrapper):
    """A Grid for any strategy, Flower's own too.

    Parameters
    ----------
    inner : Grid
        Flower's Grid.
    ledger : Ledger, optional
        Where messages are entered; a new one if unset.
    faults : Faults, optional
        Which replies are withheld, as if they had been lost; none if unset.
    meter : SocketMeter, optional
        Of the SuperLink's fleet port, in a deployment; what it counts during a round is entered in the ledger.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        ledger: Ledger | None = None,
        faults: Faults | None = None,
        meter: SocketMeter | None = None,
    ) -> None:
        super().__init__(inner)
        self.ledger = ledger or Ledger()
        self.faults = faults or Faults()
        self.meter = meter
        self._clients: dict[int, str] = {}  # by node id

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the replies that were not lost, entering both in the ledger."""
        messages = list(messages)
        if not messages:
            return []
        server_round = _round_of(messages[0])
        for message in messages:
            self._enter(message, server_round, message.metadata.dst_node_id, "downlink")
        before = None if self.meter is None else self.meter.read()
        replies = list(self.inner.send_and_receive(messages, timeout=timeout))
        if self.meter is not None and before is not None:
            self.ledger.carry(server_round, self.meter.read().since(before))
        for reply in replies:
            self._learn(reply)
            self._enter(reply, server_round, reply.metadata.src_node_id, "uplink")
        kept = [reply for reply in replies if not self._loses(server_round, reply)]
        if messages[0].metadata.message_type == MessageType.TRAIN:
            self._count(server_round, messages, kept)
        return kept

    def _enter(self, message: Message, server_round: int, node_id: int, direction: Direction) -> None:
        frames = 0
        if message.has_content():
            frames = sum(len(a.data) for record in message.content.array_records.values() for a in record.values())
        kind = str(message.metadata.message_type)
        client = self._clients.get(node_id, str(node_id))
        sizes = object_sizes(message)
        entry = Entry(server_round, client, node_id, direction, kind, sum(sizes), frames, len(sizes))
        self.ledger.enter(entry)

    def _loses(self, server_round: int, reply: Message) -> bool:
        node_id = reply.metadata.src_node_id
        return self.faults.loses(server_round, self._clients.get(node_id, str(node_id)))

    def _learn(self, reply: Message) -> None:
        """Take note of which client a node is, if its reply says so."""
        with suppress(ReplyError):
            if reply.has_content():
                self._clients[reply.metadata.src_node_id] = read_report(reply.content).client_id

    def _count(self, server_round: int, messages: list[Message], replies: list[Message]) -> None:
        errors = sum(reply.has_error() for reply in replies)
        self.ledger.note(
            server_round,
            asked=len(messages),
            replies=len(replies) - errors,
            rejected=errors,
            missing=len(messages) - len(replies),
        )


def _round_of(message: Message) -> int:
    for record in message.content.config_records.values():
        if isinstance(server_round := record.get(SERVER_ROUND), int):
            return server_round
    return 0
