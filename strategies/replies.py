"""Checking replies one by one: who sent it, which history it adds to, and its weight."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Final, NamedTuple

import numpy as np
from flwr.app import Message, RecordDict
from numpy.typing import NDArray

from fedkit.aggregation.evidence import FEATURES
from fedkit.aggregation.protocol import NOBODY, Cohort, Upload
from fedkit.arrays import NamedArrays
from fedkit.codec.wire import open_frame
from fedkit.errors import FedkitError, ReplyError
from fedkit.ledger import Ledger
from fedkit.memory import GENESIS
from fedkit.message import Report, read_frame

from .contents import metrics_of, opened, weight_of
from .registry import Registry

logger = logging.getLogger(__name__)

MAX_NORM: Final = 1e18  # the square of a larger norm would not fit a float32


class Judged(NamedTuple):
    """A reply that can be used."""

    reply: Message
    report: Report
    weight: float


@dataclass(frozen=True, slots=True)
class Inbox:
    """Checks the replies of one round, one by one; a bad reply is logged, counted, and treated as missing."""

    registry: Registry
    ledger: Ledger
    cohort: Cohort
    asked: Collection[int]  # the nodes of this round; the cohort also has nodes whose reply may come late
    weight_key: str  # the metric that is the weight of a reply
    heard: set[str] = field(default_factory=set)  # the clients whose reply can be used

    def judge(self, replies: Iterable[Message], *checks: Callable[[int, Report], None]) -> list[Judged]:
        """Return the usable replies, sorted by client id; refuse the others, also those that fail a check."""
        judged: dict[str, Judged] = {}
        for reply in replies:
            try:
                report = self.registry.read(reply, self.cohort.sent, self.asked)
                for check in checks:
                    check(reply.metadata.src_node_id, report)
                weight = weight_of(reply, self.weight_key)
                if report.client_id in judged:
                    raise ReplyError(f"another node answered as client {report.client_id!r} already.")
            except ReplyError as error:
                self._refuse(reply.metadata.src_node_id, error, counted=reply.has_error())
            else:
                judged[report.client_id] = Judged(reply, report, weight)
        self.heard.update(judged)
        return [judged[name] for name in sorted(judged)]

    def uploads(
        self,
        judged: Sequence[Judged],
        expected: Callable[[NamedArrays, Report], NamedArrays],
        contents: list[RecordDict],
    ) -> Iterator[Upload]:
        """Yield the uploads, decoded one at a time, and append the contents of accepted ones to `contents`.

        `expected` returns arrays with the names and shapes of an upload, given what was sent and the report.
        """
        for reply, report, weight in judged:
            node_id = reply.metadata.src_node_id
            try:
                data, frame, arrays, again = b"", None, None, None
                if not report.skipped:
                    like, data = expected(self.cohort.sent[node_id], report), read_frame(reply.content)
                    frame, again = open_frame(data, like=like), partial(opened, data, like)
                    values = frame.values()
                    check_norm(values)
                    arrays = frame.arrays(values)
            except FedkitError as error:
                self._refuse(node_id, error)
                self.heard.discard(report.client_id)
                continue
            digest = self.registry.accept(node_id, report, data)
            self.ledger.judge(self.cohort.server_round, node_id, "skip" if report.skipped else "")
            self.ledger.ideal(node_id, "uplink", frame.ideal_bits() if frame else 0.0)
            contents.append(reply.content)
            yield Upload(
                node_id=node_id,
                client_id=report.client_id,
                num_examples=weight,
                arrays=arrays,
                mask=None if frame is None else frame.mask,
                fresh=report.base == GENESIS,
                metrics=metrics_of(reply.content),
                wire_bytes=len(data),
                digest=digest,
                submodel=self.cohort.submodels.get(node_id, ""),
                again=again,
                features=report.options.get(FEATURES),
            )

    def tell(self, stand_ins: Mapping[str, str] = NOBODY) -> None:
        """Record who is missing in this round, and who stands in for whom; see `Ledger.miss`."""
        names = self.registry.names(self.asked)
        known = self.registry.absent(self.asked) if self.cohort.everybody else []
        missing = {*known, *(names.get(node_id, str(node_id)) for node_id in self.asked)} - self.heard
        self.ledger.miss(self.cohort.server_round, sorted(missing), stand_ins)

    def _refuse(self, node_id: int, error: Exception, *, counted: bool = False) -> None:
        if not counted:  # the grid has counted and logged error replies
            self.ledger.refuse(self.cohort.server_round, node_id, str(error))
            logger.warning("round %d, node %d: reply refused: %s", self.cohort.server_round, node_id, error)
            self.ledger.judge(self.cohort.server_round, node_id, "rejected")


def check_norm(values: NDArray[np.float32]) -> None:
    """Raise ReplyError for an upload whose norm is so large that the new parameters might not be finite."""
    with np.errstate(over="ignore"):
        energy = float(values @ values)
    if not energy < MAX_NORM**2:
        raise ReplyError(f"its upload is longer than {MAX_NORM:.0e}. Did training diverge?")
