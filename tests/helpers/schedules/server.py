"""A slow, obvious twin of what the server knows and does in a round: dicts, lists and loops."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from flwr.app import Message
from numpy.typing import NDArray

from fedkit.arrays import flatten
from fedkit.codec.wire import open_frame
from fedkit.errors import CodecError
from fedkit.memory import GENESIS
from fedkit.message import read_frame, read_report
from tests.helpers.quadratic import LIKE
from tests.helpers.schedules.clients import Clients, History, check, total, values
from tests.helpers.schedules.plan import Plan
from tests.helpers.stand_ins import recent

Exact = NDArray[np.float64]


class Accepted(NamedTuple):
    """A reply that the server must use."""

    client: str
    weight: float
    frame: bytes | None
    history: History  # what it adds to


@dataclass
class Known:
    """What the server must know, and find in its checkpoint."""

    round: int = 0
    histories: dict[str, History] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    applied: dict[tuple[str, int], History] = field(default_factory=dict)  # by client and epoch
    cosines: dict[frozenset[str], list[float]] = field(default_factory=dict)
    observed: int = 0  # rounds
    trained: list[int] = field(default_factory=list)  # rounds with metrics


@dataclass
class Server:
    """The twin of one server, over all its restarts."""

    plan: Plan
    clients: Clients
    now: Known = field(default_factory=Known)
    saved: Known | None = None
    client_of: dict[int, str] = field(default_factory=dict)  # by node; known to this life alone, as all below
    node_of: dict[str, int] = field(default_factory=dict)
    unanswered: set[int] = field(default_factory=set)
    alive: set[int] = field(
        default_factory=set
    )  # nodes that were connected and owed no answer, when some were chosen
    told: dict[int, History] = field(default_factory=dict)  # what each node was told last
    cohort: list[int] = field(default_factory=list)
    names: dict[int, str] = field(default_factory=dict)  # of the nodes in `cohort`, when they were asked

    def checkpoint(self) -> None:
        """Remember what is known now."""
        self.saved = deepcopy(self.now)

    def restart(self) -> None:
        """Go back to the checkpoint."""
        self.now = deepcopy(self.saved) if self.saved is not None else Known()
        self.client_of, self.node_of, self.unanswered, self.cohort, self.names = {}, {}, set(), [], {}
        self.told, self.alive = {}, set()

    def is_free(self, client: str, node_id: int, asked: Sequence[int] = ()) -> bool:
        """Return whether a node may be this client: nobody else is, or who was has gone or does not answer."""
        owner = self.node_of.get(client, node_id)
        return owner == node_id or (owner not in asked and owner not in self.alive)

    def meet(self, node_id: int, client: str) -> None:
        """Take note of which client a node is."""
        self.client_of[node_id], self.node_of[client] = client, node_id

    def asks(self, node_ids: Sequence[int], owing: set[int]) -> None:
        """Take note of whom the server asks to train, and of whom it may hear besides."""
        self.unanswered &= owing
        self.cohort = list(node_ids)
        self.names = {node_id: self.client_of[node_id] for node_id in node_ids if node_id in self.client_of}

    def needed(self) -> int:
        """Return how many must answer."""
        return max(1, math.ceil(self.plan.limits.quorum * len(self.cohort) - 1e-9))

    # ---- a round -------------------------------------------------------------------------------

    def round(self, server_round: int, replies: Sequence[Message]) -> list[Exact] | None:
        """Take the replies of a round; return the steps that the model may take, None if it must stay."""
        self.now.round = server_round
        judged = self.judge(replies)
        self.unanswered |= set(self.cohort)  # until `asks`: who answered an older message may yet answer this
        if len(judged) < self.needed():
            return None
        accepted = []
        for reply, one in judged:
            if one.frame is not None:
                try:
                    values(one.frame)
                except CodecError:
                    continue
            self.meet(reply.metadata.src_node_id, one.client)
            if self.plan.scheme == "safari" and one.frame is not None:
                self.now.histories[one.client] = (one.frame,)
            accepted.append(one)
        self.now.trained.append(server_round)
        return {"aquila": self.lazy, "error-feedback": self.mean, "safari": self.owners}[self.plan.scheme](
            accepted
        )

    def judge(self, replies: Iterable[Message]) -> list[tuple[Message, Accepted]]:
        """Return what can be used: one reply per client, that adds to what the server has."""
        found: dict[str, tuple[Message, Accepted]] = {}
        asked = self.unanswered | set(self.cohort)
        for reply in replies:
            if reply.has_error():
                continue
            node_id, report = reply.metadata.src_node_id, read_report(reply.content)
            client = report.client_id
            base = self.clients.histories[report.base]
            if node_id not in asked or client in found or not self.is_free(client, node_id, self.cohort):
                continue
            known = self.now.histories.get(client, ())
            if base != known and (base or self.told[node_id] != known):
                continue  # it knows another history, or starts anew since it was told one that is outdated
            weight = float(reply.content["fedkit"]["metrics/num-examples"])  # type: ignore[index, arg-type]
            frame = None if report.skipped else read_frame(reply.content)
            found[client] = reply, Accepted(client, weight, frame, base)
        return [found[client] for client in sorted(found)]

    # ---- what each scheme makes of it -----------------------------------------------------------

    def lazy(self, accepted: Sequence[Accepted]) -> list[Exact]:
        """Return the mean of all that all clients ever sent."""
        known, is_sum, void = self.now, self.plan.options["memory"] == "sum", False
        for one in accepted:
            first = one.client not in known.weights
            if one.frame is not None and is_sum and not one.history and not first:
                void = True
                continue
            if one.frame is not None:
                known.histories[one.client] = (*one.history, one.frame)
            if one.client in known.histories and (first or not is_sum):
                known.weights[one.client] = one.weight if self.plan.options["weighted"] else 1.0
        weights = known.weights.values()
        sums = sum(w * total(known.histories[c]).astype(np.float64) for c, w in known.weights.items())
        step = sums / sum(weights) if weights else np.zeros(flatten(LIKE).size)
        if void:
            known.histories, known.weights = {}, {}
        return [np.asarray(step)]

    def mean(self, accepted: Sequence[Accepted]) -> list[Exact]:
        """Return the mean of the updates; each of them counts once, however often it was sent."""
        step, weights = np.zeros(flatten(LIKE).size), 0.0
        for one in accepted:
            if one.frame is None:
                continue
            weight = one.weight if self.plan.options["weighted"] else 1.0
            step, weights = step + weight * values(one.frame).astype(np.float64), weights + weight
            self.now.histories[one.client] = (*one.history, one.frame)
            key = one.client, self.clients.epoch_of[one.frame]
            self.now.applied[key] = (*self.now.applied.get(key, ()), one.frame)
            counted, known = self.now.applied[key], self.now.histories[one.client]
            check(counted == known, f"client {one.client}: {len(counted)} uploads count, it knows of {len(known)}")
        return [step / weights if weights else step]

    def owners(self, accepted: Sequence[Accepted]) -> list[Exact]:
        """Return, entry by entry, the mean over those who sent it; several, if two clients are equally similar."""
        sent = {one.client: one for one in accepted if one.frame is not None}
        if not sent:
            return [np.zeros(flatten(LIKE).size)]
        weighted = self.plan.options["weighted"]
        own = {client: one.weight if weighted else 1.0 for client, one in sent.items()}
        masks = {client: _mask(one.frame or b"") for client, one in sent.items()}
        before = dict(self.now.weights)  # of the clients that were heard from before this round
        self.now.weights.update(own)
        self.observe(sent, masks)
        choices: list[list[str]] = []
        weights_of = []
        rule = self.plan.options["missing"]
        if rule.by == "safari" and self.now.observed >= rule.warmup_rounds:
            everybody = self.plan.options["fraction_train"] >= 1
            wanted = set(before) if everybody else set(self.names.values()) & set(before)
            for missing in sorted(wanted - set(sent)):
                kin, alike = self.kin(missing, sorted(sent))
                if alike > 0:
                    choices.append(kin)
                    weights_of.append(alike * self.now.weights[missing])
        self.now.observed += 1
        steps = []
        for chosen in itertools.islice(itertools.product(*choices), 256):
            weights = dict(own)
            for kin_of, weight in zip(chosen, weights_of, strict=True):
                weights[kin_of] += weight
            top = sum(
                weights[c] * masks[c] * values(one.frame or b"").astype(np.float64) for c, one in sent.items()
            )
            bottom = np.asarray(sum(weights[c] * masks[c] for c in sent))
            steps.append(np.divide(top, bottom, out=np.zeros_like(bottom), where=bottom > 0))
        return steps

    def observe(self, sent: Mapping[str, Accepted], masks: Mapping[str, Exact]) -> None:
        """Take note of how alike the updates are, over the entries that both sent."""
        for a, b in itertools.product(sent, sent):
            if a > b:
                continue
            both = masks[a] * masks[b]
            u, v = (values(sent[c].frame or b"").astype(np.float64) * both for c in (a, b))
            norms = math.sqrt(float(u @ u) * float(v @ v))
            if norms > 0:
                self.now.cosines.setdefault(frozenset((a, b)), []).append(float(u @ v) / norms)

    def kin(self, missing: str, among: Sequence[str]) -> tuple[list[str], float]:
        """Return who is most similar to a client, and how similar; several, if they are equally so."""
        means = {c: recent(v) for c in among if (v := self.now.cosines.get(frozenset((missing, c))))}
        most = max(means.values(), default=0.0)
        return [c for c, mean in means.items() if mean >= most - 1e-9], most

    # ---- comparison ----------------------------------------------------------------------------

    def compare(self, strategy: Any) -> None:
        """Check what the server really knows of its clients."""
        if self.plan.scheme == "safari":
            return
        accepted = {
            c: self.clients.histories.get(d) for c, d in strategy.registry.accepted.items() if d != GENESIS
        }
        check(accepted == self.now.histories, "the server knows other histories than it accepted")
        if self.plan.scheme != "aquila":
            return
        check(dict(strategy.state.weights) == self.now.weights, "the server knows other weights")
        if self.plan.options["memory"] == "each":
            for client, history in self.now.histories.items():
                same = np.array_equal(flatten(strategy.state.memory[client]), total(history))
                check(same, f"the server has another sum of client {client}")


def _mask(frame: bytes) -> Exact:
    mask = open_frame(frame, like=LIKE).mask
    if mask is None:
        return np.ones(flatten(LIKE).size)
    return np.concatenate([part.ravel() for part in mask.values()]).astype(np.float64)
