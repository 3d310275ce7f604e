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
the unweighted mean of its cluster, and every client gets, for each of its slots, the adapter of the slot's cluster.

Deviations from the paper
-------------------------
The paper does not say how clusters of two rounds correspond: here each takes the number of the former adapter
it is nearest to (the cheapest one-to-one matching), so that a client that missed rounds gets its cluster's
present adapter, where the paper leaves it with its own stale one. A slot never seen before starts from the mean
of all clusters' adapters, which in the first round is v^0. A cluster that nobody is in keeps its adapter. There
are never more clusters than different adapters.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.mean import weighted_mean
from fedkit.aggregation.protocol import Aggregate, Cohort, Upload
from fedkit.arrays import NamedArrays, add, check_same_schema, flatten
from fedkit.errors import ConfigError, SchemaMismatchError

Points: TypeAlias = NDArray[np.float64]
Slot: TypeAlias = tuple[str, int]  # client id, number

_STARTS, _STEPS = 10, 50  # of k-means: the best of so many starts, each so many steps long


@dataclass(frozen=True, slots=True)
class ClusterState:
    """Which cluster each slot of each client was last in, by client id."""

    assignment: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ClusterMean:
    """Clusters the adapters of all clients and replaces each cluster's adapter by the mean of its members."""

    num_clusters: int
    weighted: bool = False  # by the client's number of examples; False, as published: every adapter alike
    seed: int = 0  # of k-means

    def __post_init__(self) -> None:
        if self.num_clusters < 1:
            raise ConfigError(f"num_clusters must be at least 1, got {self.num_clusters}.")
        if find_spec("scipy") is None:
            raise ConfigError('clustering needs scipy, which is missing. Do: pip install "fedkit[cluster]".')

    def init(self, params: NamedArrays) -> ClusterState:
        """Return the state of a server that knows nobody; raise SchemaMismatchError for other params."""
        if (found := len(split_clusters(params))) != self.num_clusters:
            raise SchemaMismatchError(f"the arrays: expected {self.num_clusters} clusters, got {found}.")
        return ClusterState()

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: ClusterState
    ) -> Aggregate[ClusterState]:
        """Return the clusters' new adapters, and who is in which; all uploads are in memory at once."""
        slots: list[Slot] = []
        weighted: list[tuple[float, NamedArrays]] = []
        for upload in uploads:
            for number, adapter in enumerate(_adapters(cohort.sent[upload.node_id], upload)):
                slots.append((upload.client_id, number))
                weighted.append((upload.num_examples if self.weighted else 1.0, adapter))
        clusters = split_clusters(params)
        if slots:
            points, centroids = _rows(adapter for _, adapter in weighted), _rows(clusters)
            labels = self.label(slots, points, centroids)
            state = ClusterState({**state.assignment, **_by_client(slots, labels)})
            for cluster in sorted(set(labels)):
                members = (item for item, label in zip(weighted, labels, strict=True) if label == cluster)
                clusters[cluster] = weighted_mean(members, like=clusters[cluster])
            metrics = {"adapters": len(slots), "clusters": len(set(labels))}
        return Aggregate(join_clusters(clusters), state, metrics if slots else {})

    def label(self, slots: Sequence[Slot], points: Points, centroids: Points) -> list[int]:
        """Return the cluster of each adapter, a row of `points`; a row of `centroids` is a cluster's former one."""
        return match(kmeans(points, self.num_clusters, seed=self.seed), points, centroids)


def kmeans(points: Points, num_clusters: int, *, seed: int) -> list[int]:
    """Return the cluster of each row of `points`, shape (count, dim): the best of ten k-means++ starts.

    Clusters are numbered in the order of their first members, and there are no more than different rows.
    """
    from scipy.cluster.vq import kmeans2

    count = min(num_clusters, len(np.unique(points, axis=0)))
    corners = np.linalg.qr((points - points.mean(axis=0)).T, mode="r").T  # same distances, at most `count` long
    rng, best, least = np.random.default_rng(seed), [0] * len(points), np.inf
    for _ in range(_STARTS):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an empty cluster is no accident here
            centroids, labels = kmeans2(corners, count, iter=_STEPS, minit="++", rng=rng)
        inertia = float(np.square(corners - centroids[labels]).sum())
        if inertia < least:
            best, least = [int(k) for k in labels], inertia
    numbers = {k: number for number, k in enumerate(dict.fromkeys(best))}
    return [numbers[k] for k in best]


def match(labels: Sequence[int], points: Points, centroids: Points) -> list[int]:
    """Return `labels` renumbered, so that the clusters' means lie as near as can be to the `centroids`."""
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    found = np.asarray(labels)
    means = np.stack([points[found == k].mean(axis=0) for k in range(found.max() + 1)])
    rows, columns = linear_sum_assignment(cdist(means, centroids, "sqeuclidean"))
    numbers = dict(zip(rows, columns))
    return [int(numbers[k]) for k in labels]


def best_clusters(assignment: Assignment, tasks: Assignment) -> dict[int, int]:
    """Return the cluster of each task, one to one, that agrees on most slots; for evaluation alone.

    Parameters
    ----------
    assignment : Mapping[str, Sequence[int]]
        The cluster of each slot, by client id, as in `ClusterState`.
    tasks : Mapping[str, Sequence[int]]
        The true task of each slot, by client id.
    """
    from scipy.optimize import linear_sum_assignment

    pairs = _pairs(assignment, tasks)
    table = np.zeros(np.max(pairs, axis=0, initial=-1) + 1, np.int64) 
    np.add.at(table, tuple(np.transpose(pairs)), 1)
    return {int(task): int(cluster) for cluster, task in zip(*linear_sum_assignment(-table), strict=True)}
