"""FL-TAC's server side: all task adapters received are clustered, and each cluster is aggregated on its own.

S. Ping, Y. Mao, Y. Liu, X.-P. Zhang and W. Ding, "FL-TAC: Enhanced Fine-Tuning in Federated Learning via
Low-Rank, Task-Specific Adapter Clustering", ICLR 2024 Workshop on LLM Agents, https://arxiv.org/abs/2404.15384.

=========  ==========================================  ==========================================
paper      meaning                                     here
=========  ==========================================  ==========================================
N          number of tasks over all clients            `Tasks.num_clusters`
N_i        tasks of client i                           its *slots*, 0, 1, ...
v_{i,j}    adapter of client i for its task j          start + upload, under ``slot-j/``
V          adapters received in a round                `Arrivals`, a row for each
v_n        adapter of cluster n                        `params`, under ``cluster-n/``
v^0        the one adapter that all start from         `replicate`
=========  ==========================================  ==========================================

In each round V is clustered by k-means with K = N, without knowing which task an adapter is for; ``v_n`` becomes
the unweighted mean of its cluster, and a client gets, for each of its slots, the adapter of the slot's cluster.

Deviations from the paper
-------------------------
The clustering follows the rules of `fedkit.aggregation.tasks`: adapters of one client are for different tasks; the
clusters' current adapters are clustered together with those received; outliers are set aside.
`fedkit.strategies.Tac.published` has none of these rules. Where the paper specifies nothing, a cluster takes the
number of the previous adapter that it is nearest to, and an empty cluster keeps its adapter. A client that missed
rounds gets the current adapters of its clusters, where the paper leaves it with its own stale ones; a client that
joins late starts from v^0, as all others did.

Inside a cluster any aggregation can take the place of the paper's mean. To it, each slot is a client named
``CLIENT#SLOT``, whose upload is the difference between the slot's adapter and the cluster's. A lazy sum
(`LazyMean`) instead adds the upload to what the server has from the slot, which moves with the slot from cluster
to cluster.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedkit.aggregation.arrivals import Arrivals, Seen
from fedkit.aggregation.evidence import Sums, slot_name
from fedkit.aggregation.identities import Assignment
from fedkit.aggregation.lazy import LazyMean, LazyState
from fedkit.aggregation.lora import LORA_GAP
from fedkit.aggregation.mean import weighted_mean
from fedkit.aggregation.protocol import Aggregate, Aggregator, Cohort, Remembering, Upload
from fedkit.aggregation.slots import join_clusters, split_clusters
from fedkit.aggregation.tasks import Tasks
from fedkit.arrays import NamedArrays


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What a server knows of its clients' slots."""

    start: NamedArrays = field(default_factory=dict)  # what an unknown client starts from
    assignment: Assignment = field(default_factory=dict)  # the last cluster of each known client's slots
    inner: Any = None  # state of the aggregation inside clusters: one for all of them, by slot name
    seen: Seen | None = None  # the last clustering; not saved
    evidence: Sums = field(default_factory=dict)  # what each slot has sent so far, if that is clustered


@dataclass(frozen=True, slots=True)
class Clustered:
    """Finds out which adapters are for the same task, and aggregates them task by task."""

    tasks: Tasks
    inner: Aggregator[Any]

    def init(self, params: NamedArrays) -> ClusterState:
        """Return the state of a server that knows no client yet; see `recall`."""
        return self.recall(params, {}, None)

    def remember(self, state: ClusterState) -> dict[str, Any]:
        """Return the plain values that `recall` needs."""
        inner = self.inner.remember(state.inner) if isinstance(self.inner, Remembering) else state.inner
        tree = {"start": dict(state.start), "assignment": dict(state.assignment), "inner": inner}
        return tree | ({"evidence": dict(state.evidence)} if state.evidence else {})

    def recall(self, params: NamedArrays, saved: Mapping[str, Any], folder: Path | None) -> ClusterState:
        """Return the state of a run that keeps files in `folder`; of a new one if `saved` is empty.

        New clients start from the mean of the initial clusters.
        """
        clusters = split_clusters(params)
        if isinstance(self.inner, Remembering):
            inner = self.inner.recall(clusters[0], saved.get("inner", {}), folder)
        else:
            inner = saved.get("inner") if saved else self.inner.init(clusters[0])
        if saved:
            return ClusterState(saved["start"], saved["assignment"], inner, evidence=saved.get("evidence", {}))
        start = weighted_mean(((1.0, adapter) for adapter in clusters), like=clusters[0])
        return ClusterState(start, {}, inner)

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: ClusterState
    ) -> Aggregate[ClusterState]:
        """Return the clusters' new adapters and the new state; see `Arrivals` for what is held in memory."""
        clusters = split_clusters(params)
        arrivals = Arrivals(self.tasks, clusters, self._lazy(state), state.evidence)
        for upload in uploads:
            arrivals.add(upload, cohort.sent[upload.node_id])
        seen = arrivals.cluster(state.assignment)
        assignment = {**state.assignment, **seen.assignment()}
        new, inner, metrics = list(clusters), state.inner, _count(seen)
        stand_ins: dict[str, str] = {}
        for k in sorted({label for labels in assignment.values() for label in labels}):
            own = _cohort_of(k, clusters[k], cohort, assignment)
            step = self.inner(clusters[k], own, arrivals.uploads(k, own), inner)
            new[k], inner = step.params, step.state
            stand_ins |= step.stand_ins
            for key, value in step.metrics.items():
                metrics[key] = max(value, metrics.get(key, 0)) if key == LORA_GAP else metrics.get(key, 0) + value
        state = replace(state, assignment=assignment, inner=inner, seen=seen, evidence=seen.evidence)
        return Aggregate(join_clusters(new), state, metrics, _by_client(stand_ins))

    def digests(self, state: ClusterState) -> dict[str, bytes]:
        """Return, for a lazy sum, the history digest of each client of which the server has every slot."""
        known: Mapping[str, bytes] = state.inner.digests if self._lazy(state) else {}
        found = {}
        for client, labels in state.assignment.items():
            histories = {known.get(slot_name(client, slot), b"") for slot in range(len(labels))}
            if len(histories) == 1 and b"" not in histories:
                found[client] = histories.pop()
        return found

    def _lazy(self, state: ClusterState) -> LazyState | None:
        return state.inner if isinstance(self.inner, LazyMean) else None


def _cohort_of(k: int, adapter: NamedArrays, cohort: Cohort, assignment: Assignment) -> Cohort:
    """Return one cluster's cohort: its slots are the clients, and all of them were sent its adapter."""
    asked = set(cohort.client_ids.values())
    names = [
        (client, slot_name(client, slot))
        for client, labels in assignment.items()
        for slot, label in enumerate(labels)
        if label == k
    ]
    members = dict(enumerate(name for _, name in names))
    return Cohort(
        cohort.server_round,
        dict.fromkeys(members, adapter),
        {number: name for number, (client, name) in enumerate(names) if client in asked},
        owned=cohort.owned,
        everybody=cohort.everybody,
        members={name: number for number, name in members.items()},
    )


def _count(seen: Seen) -> dict[str, float]:
    metrics: dict[str, float] = {"adapters": len(seen.labels), "clusters": len(set(seen.labels))}
    return metrics | ({"set-aside": int(seen.aside.sum())} if seen.aside.any() else {})


def _by_client(stand_ins: Mapping[str, str]) -> dict[str, str]:
    """Return, for each client, the clients that stood in for its slots, separated by commas."""
    kin: dict[str, dict[str, None]] = {}
    for name, other in stand_ins.items():
        kin.setdefault(name.rpartition("#")[0], {})[other.rpartition("#")[0]] = None
    return {client: ", ".join(others) for client, others in kin.items()}
