"""Laws of k-means: what it finds, also at scale, and which rows never share a cluster."""

import numpy as np
import pytest

from fedkit.aggregation.kmeans import distances, kmeans

CENTRES = np.array([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])


def blobs(tasks, seed=0):
    return CENTRES[list(tasks)] + np.random.default_rng(seed).normal(size=(len(tasks), 3))


def partition(labels):
    """Return which rows are together, whatever the labels are."""
    return {frozenset(np.flatnonzero(np.asarray(labels) == label).tolist()) for label in labels}


def inertia(points, labels):
    return sum(np.square(points[g] - points[g].mean(axis=0)).sum() for g in map(list, partition(labels)))


@pytest.mark.parametrize("seed", range(5))
def test_clear_clusters_are_found(seed):
    tasks = [0, 1, 2, 1, 0, 2, 2, 1, 0, 0]
    assert partition(kmeans(blobs(tasks, seed), 3, seed=seed)) == partition(tasks)


def test_it_agrees_with_scikit_learns():
    from sklearn.cluster import KMeans

    points = np.random.default_rng(0).normal(size=(30, 200))  # no clusters at all: only the best start agrees
    theirs = KMeans(4, n_init=100, random_state=0).fit(points)
    assert inertia(points, kmeans(points, 4, seed=0)) <= theirs.inertia_ * 1.01


def test_slots_of_one_client_never_share_a_cluster():
    owners = [name for name in "abcde" for _ in range(2)]
    points = np.array([0, 1] * 5, float)[:, None]
    points[8] = -20.0  # the first slot of "e" is odd
    assert partition(kmeans(points, 2, seed=0)) == {frozenset({8}), frozenset(range(10)) - {8}}
    assert partition(kmeans(points, 2, seed=0, owners=owners)) == {
        frozenset({0, 2, 4, 6, 8}),
        frozenset({1, 3, 5, 7, 9}),
    }


def test_the_best_of_the_starts_is_found_when_many_slots_must_differ():
    rng = np.random.default_rng(0)
    owners = [name for name in "abcdefgh" for _ in range(5)]
    points = np.tile(rng.normal(size=(5, 500)), (8, 1)) + rng.normal(size=(40, 500)) * 2
    assert partition(kmeans(points, 5, seed=0, owners=owners)) == partition(list(range(5)) * 8)


def test_a_client_with_more_slots_than_clusters_may_share_one():
    assert partition(kmeans(blobs([0, 0, 1]), 2, seed=0, owners=["a"] * 3)) == partition([0, 0, 1])


@pytest.mark.parametrize("owners", [None, list("aabbcd")])
def test_never_more_clusters_than_different_adapters(owners):
    points = np.array([[0.0], [1.0], [0.0], [1.0], [0.0], [1.0]])
    assert partition(kmeans(points, 5, seed=0, owners=owners)) == partition([0, 1, 0, 1, 0, 1])
    assert kmeans(np.zeros((6, 2)), 5, seed=0, owners=owners) == [0] * 6


def test_known_centroids_are_one_more_start():
    points = np.random.default_rng(1).normal(size=(60, 8))
    known = np.stack([points[i::6].mean(axis=0) for i in range(6)])
    alone = inertia(points, kmeans(points, 6, seed=0))
    assert inertia(points, kmeans(points, 6, seed=0, known=known)) <= alone * (1 + 1e-9)


@pytest.mark.parametrize("size", [3, 400])
def test_distances_are_those_of_the_definition(size):
    rng = np.random.default_rng(0)
    points, centroids = rng.normal(size=(20, size)), rng.normal(size=(4, size))
    centroids[2] = points[7]
    expected = np.square(points[:, None] - centroids).sum(axis=2)
    np.testing.assert_allclose(distances(points, centroids), expected, atol=1e-9)
    assert distances(points, centroids)[7, 2] == 0
