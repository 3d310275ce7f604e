"""Which adapters are for one task: the rules of TAC's clustering, from signatures to the numbers of clusters.

In each round the rows of the adapters received are clustered by k-means, along with one row for each cluster that
has slots: its present adapter, as if one more client held all tasks. So a task that nobody sends this round keeps
its cluster, where plain k-means would split another task to fill it; a task that one client alone has keeps its
own, too; and k-means starts from the former centroids, besides at random. Clusters then take the numbers of the
former adapters that they are nearest to, one to one, and nearest in all.

What happens when
-----------------
A cluster is empty
    It keeps its adapter and its number. Once no slot that is known was last in it, a new task may take it.
There are fewer adapters than clusters
    As many clusters change as there are different adapters, at most; the others keep their adapters.
A client comes late
    Its slots start from v^0. Its adapters join the clusters that they are nearest to, or take one that is free.
An adapter is odd
    One whose update is far longer than is usual in its round is set aside (`overlong`): it is not clustered, and
    counts for nothing; its slot gets the adapter of the nearest cluster back. A round of up to half such adapters
    goes on without them. A copy of another adapter is in that one's cluster, also if it is a client's second one.

What it cannot mend
-------------------
A slot starts from its cluster's adapter, and so stays near it: what is wrong after the first rounds tends to last.
Where local training is so short that updates of one task are hardly alike, cluster by the updates of all rounds,
or by features (`evidence`), or let the first round be longer.

How many clusters there are
---------------------------
"given": as many as `num_clusters`, while there are as many different adapters. "at-most": the number, from the
most slots that a client has up to `num_clusters`, with the largest mean silhouette (P. J. Rousseeuw, "Silhouettes:
A Graphical Aid to the Interpretation and Validation of Cluster Analysis", Journal of Computational and Applied
Mathematics 20, 1987); the least number, if the best is under `STRUCTURE`: noise in as many dimensions as adapters
have is near zero. It is chosen anew in each round.
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
"""The least mean silhouette of what counts as clusters."""
SAMPLE: Final = 1000
"""Of how many adapters, at most, silhouettes are computed."""
CLEARER: Final = 2.0
"""How many times as large as that of noise the mean silhouette of features must be that "auto" goes by.

Found in the first round: five tasks about the same digits .7 to 1.1 times, five tasks of GLUE 2.3 to 7.
"""
DRAWS: Final = 5
"""How often noise is drawn."""
TIMES: Final = 4.0
"""An update that is no longer than so many median ones is usual, however alike the others are."""

_DEVIATIONS: Final = 5.0  # robust standard deviations of the logarithm of lengths that are usual
_ANCHOR: Final = "\0"  # the owner of the clusters' present adapters: no client has this id


@dataclass(frozen=True, slots=True)
class Tasks:
    """Says which adapters are for one task.

    Parameters
    ----------
    num_clusters : int
        How many clusters there are room for.
    number : {"given", "at-most"}
        Whether there are that many, or fewer if that fits better.
    signature : {"factors", "product"}
        What of adapters is compared: `fedkit.aggregation.signatures`.
    evidence : {"auto", "adapters", "updates", "features"}
        Whether the adapters of a round are clustered, the updates of all rounds, or what examples are to the
        frozen model: `fedkit.aggregation.evidence`.
    distinct : bool
        Whether adapters of one client are for different tasks, unless they are equal.
    anchored : bool
        Whether the clusters' present adapters are clustered along. False, as published: k-means alone.
    screened : bool
        Whether odd adapters are set aside. False, as published: all count.
    seed : int
        Of k-means.

    Raises
    ------
    ConfigError
        For impossible values, or without scipy.
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

        Noise that is as wide as the rows along each of their principal axes, as the reference of the gap statistic
        (R. Tibshirani, G. Walther and T. Hastie, Journal of the Royal Statistical Society B 63, 2001).
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
            Whose adapters they are; a client's are in the order of its slots.
        points : array
            Their rows, shape (adapters, values).
        former : array
            Those of each cluster until now, shape (clusters, values).
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
    """Return the owner of each row: its client, but of equal rows of a client only for the first."""
    seen: set[tuple[str, bytes]] = set()
    owners = []
    for number, (client, row) in enumerate(zip(clients, points, strict=True)):
        key = (client, row.tobytes())
        owners.append(f"{_ANCHOR}copy {number}" if key in seen else client)
        seen.add(key)
    return owners


def overlong(lengths: Sequence[float]) -> NDArray[np.bool_]:
    """Return which updates are far longer than is usual.

    Their logarithm is above the median by more than 5 robust standard deviations (1.4826 times the median absolute
    deviation: C. Leys et al., "Detecting Outliers", Journal of Experimental Social Psychology 49, 2013), and they
    are longer than `TIMES` the median. So where lengths differ much, as those of clients with many steps and few,
    more is usual. Updates of length zero have no say.

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

    Of at most `SAMPLE` rows, drawn by the seed; 0 of a row that is alone in its cluster.
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
