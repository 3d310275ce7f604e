"""k-means for rows that are mostly noise: a row's own share of its centroid is left out.

k-means maximizes Σₖ ‖sₖ‖²/nₖ, where sₖ is the sum of the nₖ rows of cluster k. Of this, Σₖ Σᵢ ‖xᵢ‖²/nₖ is what
each row adds to its own centroid: for that reason alone, the row is near to it. Where the rows of a cluster have
little in common, as do updates of few local steps, this share is most of the sum and holds every row where it is:
k-means ends where it began. Here this share is left out, so that a row joins the cluster whose *other* rows it is
most similar to. The method is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Final

import numpy as np

from fedkit.aggregation.kmeans import Labels, Points, kmeans, rows_of, shortened, squared_lengths

STARTS: Final = 20
"""Random starts, at most; the search ends earlier once the best result has been found `AGAIN` times."""
AGAIN: Final = 3
SWEEPS: Final = 50
"""How many times each owner's rows are reassigned, at most."""

_SAME: Final = 1e-6  # relative difference of two results that count as equally good


def alike(
    points: Points, num_clusters: int, *, seed: int, owners: Sequence[str], known: Sequence[int] | None = None
) -> list[int]:
    """Return the cluster of each row of `points`, the best of several starts; the numbers are arbitrary.

    Parameters
    ----------
    points : array
        Shape (rows, values).
    num_clusters : int
        The maximum number of clusters.
    seed : int
        Seed of the starts.
    owners : Sequence[str]
        One name per row; rows of the same name never share a cluster, unless there are too few clusters.
    known : Sequence[int], optional
        Labels for one additional start: those of the previous round.
    """
    short, _ = shortened(points - points.mean(axis=0), None)
    owned, rng = rows_of(owners), np.random.default_rng(seed)
    first = [kmeans(points, num_clusters, seed=seed, owners=owners), *([known] if known is not None else [])]
    best, labels, found = -np.inf, np.zeros(len(points), np.int64), 0
    for begin in chain(first, (_spread(owned, num_clusters, len(points), rng) for _ in range(STARTS))):
        value, these = _placed(short, np.array(begin, np.int64), owned, num_clusters)
        near = _SAME * max(abs(value), abs(best)) if np.isfinite(best) else 0.0
        found = 1 if value > best + near else found + (value >= best - near)
        if value > best:
            best, labels = value, these
        if found == AGAIN:
            break
    return [int(label) for label in labels]


def _spread(owned: Sequence[Labels], num_clusters: int, count: int, rng: np.random.Generator) -> Labels:
    """Return random labels, different ones for the rows of one owner."""
    labels = np.zeros(count, np.int64)
    for own in owned:
        labels[own] = np.resize(rng.permutation(num_clusters), len(own))
    return labels


def _placed(points: Points, labels: Labels, owned: Sequence[Labels], num_clusters: int) -> tuple[float, Labels]:
    """Return how similar rows are to others of their cluster, and the labels, once no owner gains by a move."""
    from scipy.optimize import linear_sum_assignment

    member = np.eye(num_clusters)[labels]
    sums, counts = member.T @ points, member.sum(axis=0)
    for _ in range(SWEEPS):
        before = labels.copy()
        for own in owned:
            np.subtract.at(sums, labels[own], points[own])
            np.subtract.at(counts, labels[own], 1)
            gains = points[own] @ sums.T / (counts + 1)
            chosen = gains.argmax(axis=1)
            if len(set(chosen.tolist())) < len(own) <= num_clusters:
                chosen = linear_sum_assignment(gains, maximize=True)[1]
            labels[own] = chosen
            np.add.at(sums, chosen, points[own])
            np.add.at(counts, chosen, 1)
        if (labels == before).all():
            break
    alone = np.bincount(labels, squared_lengths(points), minlength=num_clusters)
    return float(((squared_lengths(sums) - alone) / np.maximum(counts, 1)).sum()), labels
