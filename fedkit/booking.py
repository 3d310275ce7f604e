"""Enters messages in the ledger, under the names of the clients that sent or receive them."""

from __future__ import annotations

from contextlib import suppress

from flwr.app import ArrayRecord, Message

from fedkit.entry import Direction, Entry, Fate
from fedkit.errors import ReplyError
from fedkit.flower import object_sizes
from fedkit.ledger import Ledger
from fedkit.message import read_report, records_of


class Booking:
    """Enters messages in a ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._clients: dict[int, str] = {}  # by node id

    def meet(self, reply: Message) -> None:
        """Record which client a node is, if its reply says so."""
        with suppress(ReplyError):
            self._clients[reply.metadata.src_node_id] = read_report(reply.content).client_id

    def enter(
        self, message: Message, server_round: int, node_id: int, direction: Direction, fate: Fate = ""
    ) -> None:
        """Enter one message."""
        frames, fate = 0, "error" if message.has_error() else fate
        if message.has_content():
            frames = sum(len(a.data) for r in records_of(message.content, ArrayRecord) for a in r.values())
        kind, sizes = str(message.metadata.message_type), object_sizes(message)
        client = self._clients.get(node_id, str(node_id))
        self.ledger.enter(
            Entry(server_round, client, node_id, direction, kind, sum(sizes), frames, len(sizes), fate=fate)
        )

    def name(self, node_id: int) -> str:
        """Return the name of a node in the log."""
        client = self._clients.get(node_id)
        return f"node {node_id}" if client is None else f"node {node_id} (client {client})"
