"""Which adapters are for the same task: the rules of TAC's clustering, from signatures to cluster numbers.

In each round k-means clusters the rows of the adapters received, along with one row for each cluster that has
slots: its current adapter, as if one more client held all tasks. So a task that nobody sends in this round keeps
its cluster, where plain k-means would split another task to fill it. A task that only one client has keeps its
cluster, too. One start of k-means uses the previous centroids; the others are random. Clusters then take the
numbers of the previous adapters, matched one to one so that they are nearest in total.

What happens when
-----------------
A cluster is empty
    It keeps its adapter and its number. Once no known slot was last in it, a new task may take it.
There are fewer adapters than clusters
    At most as many clusters change as there are different adapters; the others keep their adapters.
A client joins late
    Its slots start from v^0. Its adapters join the clusters that they are nearest to, or take a free one.
An adapter is an outlier
    If its update is far longer than usual in its round, it is set aside (`overlong`): it is neither clustered nor
    aggregated, and its slot gets back the adapter of the nearest cluster. A round in which up to half of the
    adapters are such outliers goes on without them. A copy of another adapter is in the same cluster as that one,
    also if both are from the same client.

What it cannot correct
----------------------
A slot starts from its cluster's adapter, and so stays near it: a wrong cluster after the first rounds tends to
last. If local training is so short that updates for the same task have little in common, cluster by the updates of
all rounds, or by features (`evidence`), or make the first round longer.

How many clusters there are
---------------------------
"given": `num_clusters`, as long as there are that many different adapters. "at-most": the number, from the most
slots that any client has up to `num_clusters`, with the largest mean silhouette (P. J. Rousseeuw, "Silhouettes: A
Graphical Aid to the Interpretation and Validation of Cluster Analysis", Journal of Computational and Applied
Mathematics 20, 1987); the smallest such number if the best mean silhouette is below `STRUCTURE`, since that of
noise in as many dimensions as adapters have is near zero. The number is chosen anew in each round.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.alike import alike
from fedkit.aggregation.evidence import Evidence
from fedkit.aggregation.identities import match
from fedkit.aggregation.kmeans import Points, distances, kmeans
from fedkit.aggregation.signatures import Signature, Signatures
from fedkit.errors import ConfigError

Number: TypeAlias = Literal["given", "at-most"]

STRUCTURE: Final = 0.05
"""The least mean silhouette at which clusters count as such."""
SAMPLE: Final = 1000
"""The maximum number of adapters over which silhouettes are computed."""
CLEARER: Final = 2.0
"""How many times that of noise the mean silhouette of features must be for "auto" to go by features.

Found in the first round: .7 to 1.1 times for five tasks on the same digits, 2.3 to 7 for five tasks of GLUE.
"""
DRAWS: Final = 5
"""How many times noise is drawn."""
TIMES: Final = 4.0
"""An update up to this many times the median length is usual, however similar the other lengths are."""

_DEVIATIONS: Final = 5.0  # robust standard deviations of log lengths that are usual
_ANCHOR: Final = "\0"  # the owner of the clusters' present adapters: no client has this id


@dataclass(frozen=True, slots=True)
class Tasks:
    """Decides which adapters are for the same task.

    Parameters
    ----------
    num_clusters : int
        The maximum number of clusters.
    number : {"given", "at-most"}
        Whether there are exactly that many clusters, or fewer if that fits better.
    signature : {"factors", "product"}
        By what adapters are compared: `fedkit.aggregation.signatures`.
    evidence : {"auto", "adapters", "updates", "features"}
        What is clustered: the adapters of a round, the updates of all rounds, or the examples' features in the
        frozen model: `fedkit.aggregation.evidence`.
    distinct : bool
        Whether adapters of one client are for different tasks, unless they are equal.
    anchored : bool
        Whether the clusters' current adapters are clustered as well. False, as published: k-means alone.
    screened : bool
        Whether outliers are set aside. False, as published: all count.
    seed : int
        Seed of k-means.

    Raises
    ------
    ConfigError
        For invalid values, or without scipy.
    """

    num_clusters: int
    number: Number = "given"
    signature: Signature = "factors"
    distinct: bool = True
    anchored: bool = True
    screened: bool = True
    seed: int = 0
    evidence: Evidence = "auto"

    def __post_init__(self) -> None:
        if self.num_clusters < 1:
            raise ConfigError(f"num_clusters must be at least 1, got {self.num_clusters}.")
        if self.number not in get_args(Number):
            raise ConfigError(f"number: expected one of {', '.join(get_args(Number))}, got {self.number!r}.")
        if self.evidence not in get_args(Evidence):
            raise ConfigError(f"evidence: expected one of {', '.join(get_args(Evidence))}, got {self.evidence!r}.")
        Signatures(self.signature)
        if find_spec("scipy") is None:
            raise ConfigError('clustering needs scipy, which is missing. Do: pip install "fedkit[cluster]".')

    def apart(self, clients: Sequence[str], points: Points, labels: Sequence[int]) -> bool:
        """Return whether to go by clusters of features: "auto" does if they are clearer than those of noise.

        The noise is as wide as the rows along each of their principal axes, as is the reference of the gap
        statistic (R. Tibshirani, G. Walther and T. Hastie, Journal of the Royal Statistical Society B 63, 2001).
        """
        if self.evidence != "auto":
            return True
        rng, tasks = np.random.default_rng(self.seed), replace(self, evidence="features")
        chosen = np.sort(rng.permutation(len(points))[:SAMPLE]).tolist()
        rows, owners = points[chosen], [clients[row] for row in chosen]
        width = np.linalg.svd(rows - rows.mean(axis=0), compute_uv=False) / np.sqrt(len(rows))
        noise = [rng.standard_normal((len(rows), len(width))) * width for _ in range(DRAWS)]
        nowhere = np.zeros((self.num_clusters, len(width)))
        of_noise = [silhouette(each, tasks.label(owners, each, nowhere), seed=self.seed) for each in noise]
        return silhouette(points, labels, seed=self.seed) >= max(STRUCTURE, CLEARER * float(np.mean(of_noise)))

    def label(self, clients: Sequence[str], points: Points, former: Points, held: Sequence[int] = ()) -> list[int]:
        """Return the cluster of each adapter.

        Parameters
        ----------
        clients : Sequence[str]
            The client of each adapter; a client's adapters are in the order of its slots.
        points : array
            The adapters' rows, shape (adapters, values).
        former : array
            The previous row of each cluster, shape (clusters, values).
        held : Sequence[int]
            The clusters that have slots.
        """
        of_adapters = self.evidence in ("adapters", "auto")  # "auto" with features is asked as "features"
        anchors = former[list(held)] if self.anchored and of_adapters else former[:0]
        owners = _apart(clients, points) if self.distinct else [f"{_ANCHOR}{row}" for row in range(len(points))]
        for k in range(len(anchors)):  # as many tasks as clusters only if that is given
            owners.append(_ANCHOR if self.number == "given" else f"{_ANCHOR}cluster {k}")
        labels = self._clustered(np.vstack([points, anchors]), owners, former if self.anchored else None)
        return match(labels[: len(points)], points, former)

    def _clustered(self, points: Points, owners: Sequence[str], known: Points | None) -> list[int]:
        if self.number == "given":
            return self._split(points, self.num_clusters, owners, known)
        least = max(np.unique(np.asarray(owners), return_counts=True)[1].tolist())
        best, found = STRUCTURE, self._split(points, least, owners, None)
        for count in range(max(least, 2), self.num_clusters + 1):
            labels = self._split(points, count, owners, known)
            if (value := silhouette(points, labels, seed=self.seed)) > best:
                best, found = value, labels
        return found

    def _split(self, points: Points, count: int, owners: Sequence[str], known: Points | None) -> list[int]:
        if self.evidence != "updates":
            return kmeans(points, count, seed=self.seed, owners=owners, known=known)
        nearest = None if known is None or len(known) > count else distances(points, known).argmin(axis=1).tolist()
        return alike(points, count, seed=self.seed, owners=owners, known=nearest)


def _apart(clients: Sequence[str], points: Points) -> list[str]:
    """Return the owner of each row: its client, but a name of its own for a copy of that client's rows."""
    seen: set[tuple[str, bytes]] = set()
    owners = []
    for number, (client, row) in enumerate(zip(clients, points, strict=True)):
        key = (client, row.tobytes())
        owners.append(f"{_ANCHOR}copy {number}" if key in seen else client)
        seen.add(key)
    return owners


def overlong(lengths: Sequence[float]) -> NDArray[np.bool_]:
    """Return which updates are far longer than usual.

    The logarithm of their length is above the median by more than 5 robust standard deviations (1.4826 times the
    median absolute deviation: C. Leys et al., "Detecting Outliers", Journal of Experimental Social Psychology 49,
    2013), and they are longer than `TIMES` the median. So where lengths vary widely, as among clients with many
    steps and with few, longer updates count as usual. Updates of length zero are left out of the median.

    >>> overlong([1.0, 1.2, 0.9, 1e9]).tolist()
    [False, False, False, True]
    """
    logs = np.log(np.maximum(np.asarray(lengths, np.float64), 1e-300))
    moved = logs[np.asarray(lengths) > 0]
    if not moved.size:
        return np.zeros(len(lengths), np.bool_)
    middle = np.median(moved)
    spread = 1.4826 * np.median(np.abs(moved - middle))
    return np.asarray(logs > middle + max(np.log(TIMES), _DEVIATIONS * spread))


def silhouette(points: Points, labels: Sequence[int], *, seed: int) -> float:
    """Return the mean silhouette, −1 to 1: how much nearer rows are to their own cluster than to the next.

    It is taken over at most `SAMPLE` rows, drawn with the seed; a row that is alone in its cluster counts as 0.
    """
    chosen = np.sort(np.random.default_rng(seed).permutation(len(points))[:SAMPLE])
    rows, of = points[chosen] - points.mean(axis=0), np.asarray(labels)[chosen]
    member = (of[:, None] == np.unique(of)).astype(np.float64)
    counts, apart = member.sum(axis=0), np.sqrt(distances(rows, rows))
    sums = apart @ member
    own = member.astype(bool)
    others = counts[own.argmax(axis=1)] - 1
    within = sums[own] / np.maximum(others, 1)
    nearest = np.where(own, np.inf, sums / counts).min(axis=1)
    largest = np.maximum(within, nearest)
    counted = (others > 0) & (largest > 0) & np.isfinite(nearest)
    return float(np.divide(nearest - within, largest, out=np.zeros_like(within), where=counted).mean())
