"""FL-TAC's server half: k-means over all task adapters received, then the mean of each cluster.

S. Ping, Y. Mao, Y. Liu, X.-P. Zhang and W. Ding, "FL-TAC: Enhanced Fine-Tuning in Federated Learning via
Low-Rank, Task-Specific Adapter Clustering", ICLR 2024 Workshop on LLM Agents, https://arxiv.org/abs/2404.15384.

=========  ==========================================  ==========================================
paper      meaning                                     here
=========  ==========================================  ==========================================
N          number of tasks over all clients            `num_clusters`
N_i        tasks of client i                           its *slots*, 0, 1, ...
v_{i,j}    adapter of client i for its task j          start + upload, under ``slot-j/``
V          adapters received in a round                `points`, one flat adapter per row
v_n        adapter of cluster n                        `params`, under ``cluster-n/``
v^0        the one adapter that all start from         `replicate`
=========  ==========================================  ==========================================

In each round V is clustered by k-means with K = N, without knowing which task an adapter is for; ``v_n`` becomes
the unweighted mean of its cluster, and a client gets, for each of its slots, the adapter of the slot's cluster.

Deviations from the paper
-------------------------
Adapters of one client never share a cluster (unless it has more of them than there are clusters): its tasks are
different ones. Plain k-means, as published, lets one odd adapter take a cluster of its own and merges two tasks,
which then start alike and never part; `distinct=False` does that.

Where the paper says nothing: a cluster takes the number of the former adapter it is nearest to (the cheapest
one-to-one matching), and a cluster that nobody is in keeps its adapter. A client that missed rounds gets the
present adapters of its clusters, where the paper leaves it with its own stale ones; one that comes late starts
from v^0, like all before it. There are never more clusters than different adapters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.mean import weighted_mean
from fedkit.aggregation.protocol import Aggregate, Cohort, Upload
from fedkit.aggregation.slots import count_slots, join_clusters, split_clusters, split_slots
from fedkit.arrays import NamedArrays, add, flatten
from fedkit.errors import ConfigError

Assignment: TypeAlias = Mapping[str, Sequence[int]]  # a number for each slot, by client id
Points: TypeAlias = NDArray[np.float64]  # one flat adapter per row

_STARTS, _STEPS = 20, 50  # of k-means: the best of so many starts, each so many steps long


@dataclass(frozen=True, slots=True)
class ClusterState:
    """What a client that is not known starts from, and which cluster each slot of the others was last in."""

    start: NamedArrays = field(default_factory=dict)
    assignment: Assignment = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClusterMean:
    """Clusters the adapters of all clients and replaces each cluster's adapter by the mean of its members."""

    num_clusters: int
    distinct: bool = True  # no two adapters of a client in one cluster; False, as published: k-means alone
    weighted: bool = False  # by the client's number of examples; False, as published: every adapter alike
    seed: int = 0  # of k-means

    def __post_init__(self) -> None:
        if self.num_clusters < 1:
            raise ConfigError(f"num_clusters must be at least 1, got {self.num_clusters}.")
        if find_spec("scipy") is None:
            raise ConfigError('clustering needs scipy, which is missing. Do: pip install "fedkit[cluster]".')

    def init(self, params: NamedArrays) -> ClusterState:
        """Return the state of a server that knows nobody: who comes starts from the mean of the first clusters."""
        clusters = split_clusters(params)
        return ClusterState(weighted_mean(((1.0, adapter) for adapter in clusters), like=clusters[0]))

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: ClusterState
    ) -> Aggregate[ClusterState]:
        """Return the clusters' new adapters, and who is in which; all adapters are in memory at once."""
        clients: list[str] = []  # one entry per adapter, in the order of clients and their slots
        weighted: list[tuple[float, NamedArrays]] = []
        for upload in uploads:
            for adapter in _adapters(cohort.sent[upload.node_id], upload):
                clients.append(upload.client_id)
                weighted.append((upload.num_examples if self.weighted else 1.0, adapter))
        if not weighted:
            return Aggregate(params, state, {})
        clusters = split_clusters(params)
        points, former = _rows(adapter for _, adapter in weighted), _rows(clusters)
        labels = self.label(clients, points, former)
        for cluster in set(labels):
            members = (item for item, label in zip(weighted, labels, strict=True) if label == cluster)
            clusters[cluster] = weighted_mean(members, like=clusters[cluster])
        found: dict[str, tuple[int, ...]] = {}
        for name, label in zip(clients, labels, strict=True):
            found[name] = (*found.get(name, ()), label)
        metrics = {"adapters": len(labels), "clusters": len(set(labels))}
        state = ClusterState(state.start, {**state.assignment, **found})
        return Aggregate(join_clusters(clusters), state, metrics)

    def label(self, clients: Sequence[str], points: Points, former: Points) -> list[int]:
        """Return the cluster of each adapter.

        Parameters
        ----------
        clients : Sequence[str]
            Whose adapters they are; a client's are in the order of its slots.
        points : array
            Shape (adapters, values).
        former : array
            The adapter of each cluster until now, shape (clusters, values).
        """
        owners = clients if self.distinct else None
        return match(kmeans(points, self.num_clusters, seed=self.seed, owners=owners), points, former)


def kmeans(points: Points, num_clusters: int, *, seed: int, owners: Sequence[str] | None = None) -> list[int]:
    """Return the cluster of each row of `points`: the best, by squared distances, of several k-means++ starts.

    There are no more clusters than different rows. Their numbers say nothing.

    Parameters
    ----------
    owners : Sequence[str], optional
        One name per row; rows of the same name never share a cluster, unless there are too few clusters.
    """
    names = np.arange(len(points)) if owners is None else np.asarray(owners)
    groups = [np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())]
    count = min(num_clusters, len(np.unique(points, axis=0)))
    short = np.asarray(np.linalg.qr((points - points.mean(axis=0)).T, mode="r")).T  # the same distances
    rng = np.random.default_rng(seed)
    runs = [_lloyd(short, _spread(short, groups, count, rng), groups) for _ in range(_STARTS)]
    return [int(label) for label in min(runs, key=lambda run: run[0])[1]]


def _spread(points: Points, groups: list[NDArray[np.int64]], count: int, rng: np.random.Generator) -> Points:
    """Return `count` rows: a random group, then each drawn with the square of its distance to those before it.

    With groups of one row each this is k-means++.
    """
    chosen: list[int] = groups[rng.integers(len(groups))][:count].tolist()
    nearest = _distances(points, points[chosen]).min(axis=1)
    while len(chosen) < count and nearest.any():
        chosen.append(int(rng.choice(len(points), p=nearest / nearest.sum())))
        nearest = _distances(points, points[chosen]).min(axis=1)
    return points[chosen]


def _lloyd(points: Points, centroids: Points, groups: list[NDArray[np.int64]]) -> tuple[float, NDArray[np.int64]]:
    """Return the sum of squared distances to the centroids, and the labels, when these no longer change."""
    labels = np.full(len(points), -1)
    for _ in range(_STEPS):
        distances, before = _distances(points, centroids), labels.copy()
        for group in groups:
            labels[group] = _nearest(distances[group])
        if (labels == before).all():
            break
        centroids = np.stack(
            [points[labels == k].mean(axis=0) if k in labels else old for k, old in enumerate(centroids)]
        )
    return float(np.square(points - centroids[labels]).sum()), labels


def _nearest(distances: Points) -> NDArray[np.int64]:
    """Return the nearest column of each row: of several rows different ones, the nearest in all."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = distances.shape
    if 1 < rows <= columns:
        return np.asarray(linear_sum_assignment(distances)[1], np.int64)
    return np.asarray(distances.argmin(axis=1), np.int64)


def _distances(points: Points, centroids: Points) -> Points:
    """Return the squared distance of every row of `points` to every row of `centroids`."""
    return np.stack([np.square(points - centroid).sum(axis=1) for centroid in centroids], axis=1)


def match(labels: Sequence[int], points: Points, former: Points) -> list[int]:
    """Return `labels` renumbered so that the clusters' means are nearest, in all, to the rows of `former`.

    Only which rows share a label matters, not which label it is.
    """
    from scipy.optimize import linear_sum_assignment

    names = list(dict.fromkeys(labels))
    means = np.stack([points[np.asarray(labels) == name].mean(axis=0) for name in names])
    rows, columns = linear_sum_assignment(_distances(means, former))
    numbers = {names[row]: int(column) for row, column in zip(rows, columns, strict=True)}
    return [numbers[label] for label in labels]


def cluster_accuracy(assignment: Assignment, tasks: Assignment) -> float:
    """Return the share of slots in the cluster of their true task, 0 to 1; for evaluation alone."""
    numbers = clusters_of_tasks(assignment, tasks)
    hits = [numbers[task] == cluster for cluster, task in _pairs(assignment, tasks)]
    return sum(hits) / len(hits)


def clusters_of_tasks(assignment: Assignment, tasks: Assignment) -> dict[int, int]:
    """Return the cluster of each task, one to one, such that most slots agree; for evaluation alone.

    >>> clusters_of_tasks({"a": (2, 0), "b": (2,), "c": (1,)}, {"a": (0, 1), "b": (0,), "c": (2,)})
    {0: 2, 1: 0, 2: 1}
    """
    from scipy.optimize import linear_sum_assignment

    pairs = _pairs(assignment, tasks)
    size = 1 + max(map(max, pairs), default=-1)
    agree = np.zeros((size, size), np.int64)
    for cluster, task in pairs:
        agree[task, cluster] += 1
    return dict(enumerate(map(int, linear_sum_assignment(agree, maximize=True)[1])))


def _adapters(sent: NamedArrays, upload: Upload) -> list[NamedArrays]:
    """Return the adapters that a client has after training: what it started from, plus its upload."""
    if upload.arrays is None:
        return []
    num_slots = count_slots(upload.arrays)
    updates = split_slots(upload.arrays, num_slots)
    return [add(start, update) for start, update in zip(split_slots(sent, num_slots), updates, strict=True)]


def _rows(adapters: Iterable[NamedArrays]) -> Points:
    return np.stack([flatten(adapter) for adapter in adapters]).astype(np.float64)


def _pairs(assignment: Assignment, tasks: Assignment) -> list[tuple[int, int]]:
    """Return (cluster, task) of every slot that both know."""
    names = [name for name in assignment if name in tasks]
    return [pair for name in names for pair in zip(assignment[name], tasks[name], strict=True)]
