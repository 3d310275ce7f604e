"""Cluster numbers that persist from round to round, and how well clusters agree with the true tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.kmeans import Points, distances

Assignment: TypeAlias = Mapping[str, Sequence[int]]
"""The number of each slot's cluster or task, by client id."""


def match(labels: Sequence[int], points: Points, former: Points) -> list[int]:
    """Return `labels` renumbered so that the clusters' means are nearest, in total, to the rows of `former`.

    Only which rows share a label matters, not which label it is. The renumbering is the cheapest one-to-one
    matching (H. W. Kuhn, "The Hungarian Method for the Assignment Problem", 1955).
    """
    from scipy.optimize import linear_sum_assignment

    names = list(dict.fromkeys(labels))
    means = np.stack([points[np.asarray(labels) == name].mean(axis=0) for name in names])
    rows, columns = linear_sum_assignment(distances(means, former))
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

    table = _table(assignment, tasks)
    agree = np.zeros([max(table.shape)] * 2, np.int64)
    agree[: table.shape[1], : table.shape[0]] = table.T
    return dict(enumerate(map(int, linear_sum_assignment(agree, maximize=True)[1])))


def purity(assignment: Assignment, tasks: Assignment) -> float:
    """Return the share of slots whose task is the most frequent one of their cluster; for evaluation alone.

    C. D. Manning, P. Raghavan and H. Schütze, "Introduction to Information Retrieval", 2008, section 16.3.

    >>> purity({"a": (0, 0), "b": (1, 1)}, {"a": (0, 1), "b": (1, 1)})
    0.75
    """
    table = _table(assignment, tasks)
    return float(table.max(axis=1).sum() / table.sum())


def adjusted_rand_index(assignment: Assignment, tasks: Assignment) -> float:
    """Return how well sharing a cluster agrees with sharing a task, over pairs of slots; for evaluation alone.

    1: exactly; 0: as by chance. L. Hubert and P. Arabie, "Comparing Partitions", J. of Classification 2, 1985.

    >>> adjusted_rand_index({"a": (0, 0), "b": (1, 1)}, {"a": (5, 5), "b": (3, 3)})
    1.0
    """
    table = _table(assignment, tasks)

    def count(groups: NDArray[np.int64]) -> float:
        return float((groups * (groups - 1) // 2).sum())

    both, found, true = count(table), count(table.sum(axis=1)), count(table.sum(axis=0))
    chance = found * true / (count(table.sum(keepdims=True)) or 1.0)
    most = (found + true) / 2
    return (both - chance) / (most - chance) if most != chance else 1.0


def _table(assignment: Assignment, tasks: Assignment) -> NDArray[np.int64]:
    """Return the number of slots in each cluster (row) of each task (column)."""
    clusters, true = np.array(_pairs(assignment, tasks), np.int64).reshape(-1, 2).T
    table = np.zeros((1 + clusters.max(initial=-1), 1 + true.max(initial=-1)), np.int64)
    np.add.at(table, (clusters, true), 1)
    return table


def _pairs(assignment: Assignment, tasks: Assignment) -> list[tuple[int, int]]:
    """Return (cluster, task) for every slot that is in both."""
    names = [name for name in assignment if name in tasks]
    return [pair for name in names for pair in zip(assignment[name], tasks[name], strict=False)]
