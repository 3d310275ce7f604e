"""What the server knows of its nodes: which client each one is, and which of its uploads were accepted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

from flwr.app import Message, RecordDict

from fedkit.errors import ReplyError
from fedkit.memory import GENESIS, chain
from fedkit.message import Report, read_report, restore_metrics

from .contents import content_of, weight_of

logger = logging.getLogger(__name__)


class Registry:
    """Maps nodes to clients, and clients to the digest of what was accepted from them.

    Parameters
    ----------
    name_of : callable
        Returns the name of the part of the model that a node holds, given its report.
    """

    def __init__(self, name_of: Callable[[Report], str]) -> None:
        self._name_of = name_of
        self.accepted: dict[str, bytes] = {}  # by client id
        self.told: dict[int, bytes] = {}  # the digest that each node was told last; by node id
        self.versions: dict[int, bytes] = {}  # of the arrays that a node said it holds; by node id
        self.submodels: dict[int, str] = {}  # the part of the model that a node said it holds; by node id
        self.alive: Collection[int] = ()  # the nodes that are connected and owe no answer
        self._before: dict[str, bytes] = {}  # in a resumed run: what clients held at the checkpoint
        self._history: Sequence[bytes] = ()  # the versions at the checkpoint, oldest first
        self._client_ids: dict[int, str] = {}  # by node id; known once a node has answered
        self._node_ids: dict[str, int] = {}  # by client id; the node that answered last as this client

    def held(self) -> dict[str, bytes]:
        """Return the version that each client reported to hold, by client id."""
        now = {name: self.versions[node] for name, node in self._node_ids.items() if node in self.versions}
        return self._before | now

    def recall(self, held: Mapping[str, bytes], history: Sequence[bytes]) -> None:
        """Restore what `held` returned; `history` has the versions of that time, oldest first."""
        self._before, self._history = dict(held), history

    def order(self, node_id: int) -> tuple[str, int]:
        """Return a sort key that begins with the client id, since node ids are random."""
        return self._client_ids.get(node_id, ""), node_id

    def accepted_from(self, node_id: int) -> bytes:
        """Return the digest of what was accepted from this node's client."""
        return self.accepted.get(self._client_ids.get(node_id, ""), GENESIS)

    def read(self, reply: Message, asked: Collection[int], now: Collection[int]) -> Report:
        """Return the report of a reply to a message of this round, or to an older one.

        Parameters
        ----------
        reply : Message
            What a node answered.
        asked : Collection[int]
            The nodes that may answer.
        now : Collection[int]
            Those of them that were asked in this round.

        Raises
        ------
        ReplyError
            If the node was not asked, reports a client id that another node of the round has, or adds to a history
            that the server does not have.
        """
        node_id, report = reply.metadata.src_node_id, self.read_version(reply)
        if node_id not in asked:
            raise ReplyError("it was not asked.")
        self._check_name(node_id, report.client_id, now)
        accepted = self.accepted.get(report.client_id, GENESIS)
        if report.base != accepted and (report.base != GENESIS or self.told.get(node_id) != accepted):
            raise ReplyError("its upload adds to a history that the server does not have.")
        return report

    def _check_name(self, node_id: int, client_id: str, asked: Collection[int] = ()) -> None:
        """Raise ReplyError if a node changes its client id, or uses that of a node that is alive or was asked.

        A SuperNode that was killed and restarted may have a new node id; it takes over its client's id.
        """
        known, owner = self._client_ids.get(node_id, client_id), self._node_ids.get(client_id)
        if known != client_id:
            raise ReplyError(f"it was client {known!r} before, and now says that it is {client_id!r}.")
        if owner != node_id and (owner in asked or owner in self.alive):
            raise ReplyError(f"another node is client {client_id!r} already.")

    def read_version(self, reply: Message) -> Report:
        """Return the report of a reply, and note what its node holds; after an error, nothing is known of it.

        Raises
        ------
        ReplyError
            If the reply is an error, or has no report.
        """
        node_id = reply.metadata.src_node_id
        self.versions.pop(node_id, None)
        self.submodels.pop(node_id, None)  # an error may mean that it holds another part now
        report = read_report(content_of(reply))
        restore_metrics(reply.content)
        self.versions[node_id] = report.version
        self.submodels[node_id] = self._name_of(report)
        return report

    def readable(self, replies: Iterable[Message], weight_key: str) -> list[RecordDict]:
        """Return the contents of the evaluation replies that can be used; log the others."""
        contents = []
        for reply in replies:
            try:
                self.read_version(reply)
                weight_of(reply, weight_key)
                contents.append(reply.content)
            except ReplyError as error:
                logger.warning("node %d, evaluation: %s", reply.metadata.src_node_id, error)
        return contents

    def knows(self, node_id: int) -> bool:
        """Return whether this node has said which client it is."""
        return node_id in self._client_ids

    def absent(self, node_ids: Collection[int]) -> list[str]:
        """Return the known clients that are not at any of these nodes."""
        return sorted({*self.accepted, *self._node_ids} - set(self.names(node_ids).values()))

    def introduce(self, reply: Message) -> None:
        """Note which client a node is, and what it holds; raises ReplyError as `read_version` does.

        In a resumed run, the node counts as holding what it held at the checkpoint. What it received after that is
        sent again, so that a resumed run sends what it would have sent without the interruption.
        """
        report, node_id = self.read_version(reply), reply.metadata.src_node_id
        history, name = self._history, report.client_id
        if report.version in history and name not in self._node_ids:
            before = self._before.get(name, GENESIS)
            if before == GENESIS or before in history[: history.index(report.version)]:
                self.versions[node_id] = before
        self._check_name(node_id, name)
        self._meet(node_id, name)

    def _meet(self, node_id: int, client_id: str) -> None:
        self._before.pop(client_id, None)
        self._client_ids[node_id] = client_id
        self._node_ids[client_id] = node_id

    def names(self, node_ids: Collection[int]) -> dict[int, str]:
        """Return the client ids of those nodes that have answered at least once."""
        return {node_id: self._client_ids[node_id] for node_id in node_ids if node_id in self._client_ids}

    def accept(self, node_id: int, report: Report, frame: bytes) -> bytes:
        """Note that an upload or a skip was accepted; return the digest of all uploads of its client."""
        self._meet(node_id, report.client_id)
        if report.skipped:
            return report.base
        digest = self.accepted[report.client_id] = chain(report.base, frame)
        return digest
