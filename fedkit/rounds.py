"""The limits of a round: the Grid wrapper that fedkit passes to Flower's own `start`.

A message is on its way from `send_and_receive` until its reply is pulled or its deadline passes. A round ends when

- every message of it was answered, or
- `quorum` of the nodes asked have answered and `grace` seconds have passed since, or
- the `deadline` passes, after which a reply is of no use to Flower either, since it is the messages' ttl.

=======================================  ==========================================================
what happens                             what is done
=======================================  ==========================================================
fewer than `quorum` answered             the model stays and the log says so, or `QuorumError`
a reply arrives after its round ended    with `late="use"` it counts in the round in which it came;
                                         with ``"discard"`` it is dropped
a reply arrives twice                    the second one is dropped
a node has not answered yet              it is not asked; nor to train while its late reply awaits a round
a node fails twice in a row, or more     it is not asked for 1, 2, 4, then 8 rounds; an answer clears it
=======================================  ==========================================================

A node fails if it answers with an error, or not before the deadline. A reply that Flower calls unavailable, since
its node went offline, is missing, which is not a failure.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from flwr.app import Message, MessageType
from flwr.serverapp import Grid

from fedkit.booking import Booking
from fedkit.errors import LACKING
from fedkit.faults import Faults
from fedkit.faulty import FaultyGrid
from fedkit.flower import GridWrapper, is_unavailable
from fedkit.ledger import Ledger
from fedkit.limits import Clock, Limits, Pauses
from fedkit.message import STYPE, round_of
from fedkit.sockets import SocketMeter

logger = logging.getLogger(__name__)

QUESTION: Final = "question"  # the kind of a message that is not part of a round's training
_POLL_FIRST, _POLL_MOST = 0.05, 1.0  # seconds between two polls for replies


@dataclass(frozen=True, slots=True)
class Sent:
    """A message that is not answered yet."""

    node_id: int
    server_round: int
    kind: str  # Flower's message type, or `QUESTION`
    expires: float  # on the clock


class RoundGrid(GridWrapper):
    """A Grid for any strategy, including Flower's own; fedkit's strategies set its `limits`.

    Parameters
    ----------
    inner : Grid
        Flower's Grid.
    ledger : Ledger, optional
        Where messages are entered; a new one if unset.
    limits : Limits, optional
        The limits of every round.
    faults : Faults, optional
        Scheduled faults; none if unset.
    meter : SocketMeter, optional
        Meter of the SuperLink's fleet port in a deployment; its count in a round is entered in the ledger.
    clock : Clock
        Python's `time`.
    """

    def __init__(
        self,
        inner: Grid,
        *,
        ledger: Ledger | None = None,
        limits: Limits | None = None,
        faults: Faults | None = None,
        meter: SocketMeter | None = None,
        clock: Clock = time,
    ) -> None:
        super().__init__(inner if faults is None else FaultyGrid(inner, faults, clock.monotonic, self._lost))
        self.ledger, self.limits, self.meter, self.clock = ledger or Ledger(), limits or Limits(), meter, clock
        self._pauses = Pauses()
        self._sent: dict[str, Sent] = {}  # without an answer, by message id
        self._late: list[Message] = []
        self._booking = Booking(self.ledger)

    def ready(
        self, node_ids: Iterable[int], server_round: int, at_least: int = 1, *, spare: bool = True
    ) -> list[int]:
        """Return the nodes that may be asked: no message is on its way to them, and they are not paused.

        Unless `spare` is False, nodes whose late answer the next training round will use are left out: `Pauses`.
        """
        for sent, reply in self._pull():
            self._keep_late(sent, reply, server_round)
        self._expire()
        busy = self._busy()
        idle = [node_id for node_id in node_ids if node_id not in busy]
        return self._pauses.choose(idle, self.late_nodes() if spare else set(), server_round, at_least)

    def late_nodes(self) -> set[int]:
        """Return the nodes whose late answer waits for a round of training to use it."""
        return {reply.metadata.src_node_id for reply in self._late}

    def owing(self) -> set[int]:
        """Return the nodes with a reply that may still come, or has come, but has not been used by a round."""
        return self._busy() | self.late_nodes()

    def _busy(self) -> set[int]:
        return {sent.node_id for sent in self._sent.values()}

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and return the round's replies and late ones; all are entered in the ledger.

        Raises
        ------
        QuorumError
            If too few nodes answered, and the limits say that this ends the run.
        """
        messages = list(messages)
        if not messages:
            return []
        server_round, kind = round_of(messages[0]), messages[0].metadata.message_type
        before = None if self.meter is None else self.meter.read()
        ids = self._send(messages, server_round, kind, timeout)
        replies = self._collect(ids, server_round, len(messages))
        if self.meter is not None and before is not None:
            self.ledger.carry(server_round, self.meter.read().since(before))
        if kind != MessageType.TRAIN:
            return replies
        asked, good = len(messages), sum(reply.has_content() for reply in replies)
        counts = {"rejected": len(replies) - good, "missing": asked - len(replies)}
        self.ledger.note(server_round, asked=asked, replies=good, **counts)
        needed, late, self._late = self.limits.needed(asked), self._late, []
        if good + len(late) < needed:
            self.limits.refuse(f"Round {server_round}: {good} of {asked} nodes answered, {needed} needed.")
            return []
        return [*replies, *late]

    def ask(self, messages: Sequence[Message], *, timeout: float) -> list[Message]:
        """Send messages that are not part of a round's training; return the replies that come in time."""
        ids = self._send(messages, round_of(messages[0]), QUESTION, timeout)
        return self._collect(ids, round_of(messages[0]), len(messages))

    # ---- sending -------------------------------------------------------------------------------

    def _send(self, messages: Sequence[Message], server_round: int, kind: str, timeout: float | None) -> set[str]:
        """Send the messages whose nodes are not busy; return the ids."""
        busy = self._busy()
        messages = [message for message in messages if message.metadata.dst_node_id not in busy]
        if kind == MessageType.TRAIN:  # their older late answers are no longer of use
            again = {message.metadata.dst_node_id for message in messages}
            self._late = [reply for reply in self._late if reply.metadata.src_node_id not in again]
        seconds, ids = self.limits.deadline or timeout or math.inf, set()
        expires = self.clock.monotonic() + seconds
        for message, message_id in zip(messages, list(self.inner.push_messages(messages)), strict=False):
            node_id = message.metadata.dst_node_id
            if not message_id:
                who = self._booking.name(node_id)
                logger.warning("round %d: Flower refused the message to %s.", server_round, who)
                continue
            self._booking.enter(message, server_round, node_id, "downlink")
            self._sent[message_id] = Sent(node_id, server_round, kind, expires)
            ids.add(message_id)
        return ids

    # ---- receiving -----------------------------------------------------------------------------

    def _collect(self, ids: set[str], server_round: int, asked: int) -> list[Message]:
        """Return the replies to `ids` that come before the round ends."""
        replies: list[Message] = []
        quorum_at, pause = math.inf, _POLL_FIRST
        while True:
            for sent, reply in self._pull():
                if sent.server_round != server_round or not ids & {reply.metadata.reply_to_message_id}:
                    self._keep_late(sent, reply, server_round)
                elif not is_unavailable(reply):
                    self._booking.enter(reply, server_round, sent.node_id, "uplink")
                    replies.append(reply)
            self._expire()
            now = self.clock.monotonic()
            if quorum_at == math.inf and sum(r.has_content() for r in replies) >= self.limits.needed(asked):
                quorum_at = now
            over = self.limits.grace is not None and now >= quorum_at + self.limits.grace
            if over or not ids & self._sent.keys():
                self._tell(ids, server_round)
                return replies
            self.clock.sleep(pause)
            pause = min(1.5 * pause, _POLL_MOST)

    def _pull(self) -> list[tuple[Sent, Message]]:
        """Return the replies that have come, each once, with the messages they answer."""
        pulled = []
        for reply in self.inner.pull_messages(list(self._sent)) if self._sent else []:
            sent = self._sent.pop(reply.metadata.reply_to_message_id, None)
            if sent is None:
                logger.warning("a reply came twice, or to a message that expired: dropped.")
                continue
            if reply.has_content():
                self._booking.meet(reply)
                self._pauses.clear(sent.node_id)
            else:
                reason = LACKING if STYPE in (text := " ".join(str(reply.error.reason).split())) else text
                logger.warning("round %d, %s: %s", sent.server_round, self._booking.name(sent.node_id), reason)
                if not is_unavailable(reply):
                    self._pauses.fail(sent.node_id, sent.server_round)
                    self.ledger.refuse(sent.server_round, sent.node_id, reason)
            pulled.append((sent, reply))
        return pulled

    def _keep_late(self, sent: Sent, reply: Message, server_round: int) -> None:
        if not reply.has_content():
            return
        used = sent.kind == MessageType.TRAIN and self.limits.late == "use"
        self._booking.enter(reply, server_round, sent.node_id, "uplink", "" if used else "late")
        self.ledger.note(server_round, late=1)
        who, fate = self._booking.name(sent.node_id), "used" if used else "dropped"
        logger.info("round %d, %s: its answer came late, and is %s.", sent.server_round, who, fate)
        self._late += [reply] if used else []

    def _tell(self, ids: set[str], server_round: int) -> None:
        """Log the nodes whose answers a round did not wait for."""
        if late := [self._booking.name(self._sent[message_id].node_id) for message_id in ids & self._sent.keys()]:
            logger.warning("round %d goes on without %s.", server_round, ", ".join(sorted(late)))

    def _expire(self) -> None:
        """Give up on messages whose deadline has passed."""
        now = self.clock.monotonic()
        for message_id in [message_id for message_id, sent in self._sent.items() if sent.expires <= now]:
            sent = self._sent.pop(message_id)
            logger.warning("round %d, %s: no answer in time.", sent.server_round, self._booking.name(sent.node_id))
            self._pauses.fail(sent.node_id, sent.server_round)

    def _lost(self, reply: Message) -> None:
        """Enter a reply that was sent, and then lost by the fault schedule."""
        if sent := self._sent.get(reply.metadata.reply_to_message_id):
            if reply.has_content():
                self._booking.meet(reply)
            self._booking.enter(reply, sent.server_round, sent.node_id, "uplink", "lost")
