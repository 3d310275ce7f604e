"""A Grid with scheduled faults: replies are lost, late or duplicated; nodes and the server crash."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol, runtime_checkable

from flwr.app import Message
from flwr.serverapp import Grid

from fedkit.errors import CrashError, ReplyError
from fedkit.faults import Faults
from fedkit.flower import GridWrapper, unavailable
from fedkit.message import read_report, round_of


@runtime_checkable
class Restartable(Protocol):
    """A Grid whose nodes can lose what they hold in memory."""

    def restart(self, node_id: int) -> None:
        """Restart a node, without what it held in memory."""


class FaultyGrid(GridWrapper):
    """Passes messages on, and replies as the schedule has it.

    A lost reply is replaced at once by Flower's answer for a node that went offline, so that nobody waits for it.
    A crash of a client loses its reply and, where nodes are restartable, its memory.

    Parameters
    ----------
    inner : Grid
        The Grid that messages are passed on to.
    faults : Faults
        The schedule.
    now : callable
        Returns seconds since some fixed moment.
    lost : callable
        Called with each reply that is withheld.
    """

    def __init__(
        self, inner: Grid, faults: Faults, now: Callable[[], float], lost: Callable[[Message], None]
    ) -> None:
        super().__init__(inner)
        self.faults, self._now, self._lost = faults, now, lost
        self._asked: dict[str, Message] = {}  # by message id
        self._held: list[tuple[float, Message]] = []  # when to deliver
        self._last_round: int | None = None

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; raise CrashError if the schedule has the server crash, unless it was just resumed."""
        messages = list(messages)
        if messages:
            server_round, before = round_of(messages[0]), self._last_round
            if before is not None and before < server_round and self.faults.server_crashes(server_round):
                raise CrashError(f"the schedule lets the server crash in round {server_round}.")
            self._last_round = server_round
        ids = list(self.inner.push_messages(messages))
        self._asked.update(zip(ids, messages, strict=False))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that the schedule has let through by now."""
        wanted = set(message_ids)
        self._asked = {key: asked for key, asked in self._asked.items() if key in wanted}  # others were given up
        held = {reply.metadata.reply_to_message_id for _, reply in self._held}
        replies = []
        for reply in self.inner.pull_messages([m for m in wanted if m not in held]):
            asked = self._asked.pop(reply.metadata.reply_to_message_id, None)
            replies += [reply] if asked is None else self._judge(asked, reply)
        now = self._now()
        replies += [reply for at, reply in self._held if at <= now]
        self._held = [(at, reply) for at, reply in self._held if at > now]
        return replies

    def _judge(self, asked: Message, reply: Message) -> list[Message]:
        """Return what is delivered at once for a reply."""
        if not asked.content.array_records:
            return [reply]  # only asks which client this is
        server_round, client = round_of(asked), _client_of(reply)
        crashed = self.faults.client_crashes(server_round, client)
        if crashed and isinstance(self.inner, Restartable):
            self.inner.restart(asked.metadata.dst_node_id)
        if crashed or self.faults.loses(server_round, client):
            self._lost(reply)
            return [unavailable(asked)]
        if self.faults.duplicates(server_round, client):
            self._held.append((self._now(), reply))
        if (delay := self.faults.delay(server_round, client)) > 0:
            self._held.append((self._now() + delay, reply))
            return []
        return [reply]


def _client_of(reply: Message) -> str:
    """Return the client that a reply says it is from; for other strategies' replies, the node."""
    try:
        return read_report(reply.content).client_id
    except (ReplyError, ValueError):
        return str(reply.metadata.src_node_id)
