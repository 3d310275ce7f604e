"""k-means with cannot-link constraints, seeded by k-means++ or by known centroids.

D. Arthur and S. Vassilvitskii, "k-means++: The Advantages of Careful Seeding", SODA 2007; S. P. Lloyd, "Least
Squares Quantization in PCM", IEEE TIT 28(2), 1982; cannot-link constraints as in K. Wagstaff, C. Cardie, S. Rogers
and S. Schrödl, "Constrained K-means Clustering with Background Knowledge", ICML 2001.

Deviations
----------
COP-KMEANS assigns rows one by one, and fails if no cluster is left for the next row. Here all rows of one owner
are assigned at once, to different clusters at the least cost. Seeding begins with all rows of one owner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

Points: TypeAlias = NDArray[np.float64]
"""One point per row."""

Labels: TypeAlias = NDArray[np.int64]

STARTS: Final = 20
"""Random starts, at most; k-means ends earlier once the best result has been found `AGAIN` times."""
AGAIN: Final = 3
STEPS: Final = 50
"""Steps of each start, at most."""

_SAME: Final = 1e-4  # relative difference of the sums of squares of two results that count as equally good


def kmeans(
    points: Points,
    num_clusters: int,
    *,
    seed: int,
    owners: Sequence[str] | None = None,
    known: Points | None = None,
) -> list[int]:
    """Return the cluster of each row of `points`: the best, by squared distances, of several starts.

    There are at most as many clusters as distinct rows. The clusters' numbers are arbitrary.

    Parameters
    ----------
    points : array
        Shape (rows, values).
    num_clusters : int
        The maximum number of clusters.
    seed : int
        Seed of the starts.
    owners : Sequence[str], optional
        One name per row; rows of the same name never share a cluster, unless there are too few clusters.
    known : array, optional
        Centroids for one additional start, at most `num_clusters` rows: those of the previous round.
    """
    count = min(num_clusters, _num_different(points))
    centre = points.mean(axis=0)
    short, first = shortened(points - centre, None if known is None else known - centre)
    owned = _Owned.of(owners, len(points))
    rng = np.random.default_rng(seed)
    best, labels, found = np.inf, np.zeros(len(points), np.int64), 0
    warm = [first] if first is not None and len(first) <= count else []
    for begin in chain(warm, (_spread(short, owned, count, rng) for _ in range(STARTS))):
        cost, these = _lloyd(short, begin, owned)
        if cost < best * (1 - _SAME):
            found = 0
        found += cost <= best * (1 + _SAME)
        if cost < best:
            best, labels = cost, these
        if found == AGAIN:
            break
    return [int(label) for label in labels]


def distances(points: Points, centroids: Points, lengths: Points | None = None) -> Points:
    """Return the squared distance of each row of `points`, of squared `lengths` if known, to each centroid."""
    lengths = squared_lengths(points) if lengths is None else lengths
    squares = lengths[:, None] + squared_lengths(centroids)
    apart = squares - 2 * (points @ centroids.T)
    apart[apart < 1e-14 * squares] = 0.0  # what is left of equal rows is rounding
    return apart


def squared_lengths(points: Points) -> Points:
    """Return the sum of squares of each row."""
    return np.asarray(np.einsum("ij,ij->i", points, points))


def rows_of(owners: Sequence[str]) -> list[Labels]:
    """Return the rows of each owner, ordered by each owner's first row."""
    found: dict[str, list[int]] = {}
    for row, owner in enumerate(owners):
        found.setdefault(owner, []).append(row)
    return [np.array(rows) for rows in found.values()]


@dataclass(frozen=True, slots=True)
class _Owned:
    """The rows of each owner."""

    rows: Labels  # the first row of each owner
    several: list[Labels]  # all rows of each owner that has several

    @classmethod
    def of(cls, owners: Sequence[str] | None, count: int) -> _Owned:
        if owners is None:
            return cls(np.arange(count), [])
        every = rows_of(owners)
        return cls(np.array([rows[0] for rows in every]), [rows for rows in every if len(rows) > 1])

    def first(self, rng: np.random.Generator) -> list[int]:
        """Return all rows of a random owner."""
        row = int(self.rows[rng.integers(len(self.rows))])
        return next((rows.tolist() for rows in self.several if rows[0] == row), [row])


def _num_different(points: Points) -> int:
    """Return the number of distinct rows."""
    return len({row.tobytes() for row in points + 0.0})  # +0.0, for −0 is 0


def shortened(points: Points, known: Points | None) -> tuple[Points, Points | None]:
    """Return rows with the same distances to each other, but no more values than there are rows."""
    count = len(points)
    together = points if known is None else np.vstack([points, known])
    if together.shape[1] > len(together):
        together = np.asarray(np.linalg.qr(together.T, mode="r")).T
    return together[:count], None if known is None else together[count:]


def _spread(points: Points, owned: _Owned, count: int, rng: np.random.Generator) -> Points:
    """Return `count` rows: a random owner's, then each the best of several drawn by squared distance.

    If each owner has one row, this is greedy k-means++ with as many draws as scikit-learn makes.
    """
    chosen = owned.first(rng)[:count]
    lengths = squared_lengths(points)
    nearest = distances(points, points[chosen], lengths).min(axis=1)
    while len(chosen) < count and nearest.any():
        drawn = rng.choice(len(points), 2 + int(np.log(count)), p=nearest / nearest.sum())
        then = np.minimum(nearest[:, None], distances(points, points[drawn], lengths))
        best = int(then.sum(axis=0).argmin())
        chosen.append(int(drawn[best]))
        nearest = then[:, best]
    return points[chosen]


def _lloyd(points: Points, centroids: Points, owned: _Owned) -> tuple[float, Labels]:
    """Return the sum of squared distances to the centroids, and the labels, when these no longer change."""
    labels, lengths = np.full(len(points), -1), squared_lengths(points)
    for _ in range(STEPS):
        before, labels = labels, _nearest(distances(points, centroids, lengths), owned)
        if (labels == before).all():
            break
        centroids = means(points, labels, centroids)
    return float(np.square(points - centroids[labels]).sum()), labels


def means(points: Points, labels: Labels, empty: Points) -> Points:
    """Return the mean of each cluster; for a cluster without rows, its row of `empty`."""
    member = np.zeros((len(empty), len(points)))
    member[labels, np.arange(len(points))] = 1.0
    counts = member.sum(axis=1, keepdims=True)
    return np.where(counts > 0, (member @ points) / np.maximum(counts, 1), empty)


def _nearest(apart: Points, owned: _Owned) -> Labels:
    """Return the nearest column of each row; for the rows of one owner, different columns, nearest in total."""
    from scipy.optimize import linear_sum_assignment

    labels = np.asarray(apart.argmin(axis=1), np.int64)
    for rows in owned.several:
        if len(rows) <= apart.shape[1] and len(set(labels[rows].tolist())) < len(rows):
            labels[rows] = linear_sum_assignment(apart[rows])[1]
    return labels
