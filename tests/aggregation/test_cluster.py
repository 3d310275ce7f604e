"""Laws of clustering: what k-means finds, what names its clusters get, and what happens to empty ones."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkit.aggregation.cluster import (
    ClusterMean,
    ClusterState,
    cluster_accuracy,
    clusters_of_tasks,
    kmeans,
    match,
)
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.aggregation.slots import count_slots, join_clusters, join_slots, replicate, split_clusters, split_slots
from fedkit.errors import ConfigError, SchemaMismatchError

CENTRES = np.array([[0.0, 0.0, 0.0], [9.0, 0.0, 0.0], [0.0, 9.0, 0.0]])


def blobs(tasks, seed=0):
    return CENTRES[list(tasks)] + np.random.default_rng(seed).normal(size=(len(tasks), 3))


def adapter(*values):
    return {"w": np.array(values, np.float32)}


def aggregate(aggregator, clusters, uploads, state=None, examples=None):
    """One round in which every client is sent cluster 0's adapter; `uploads`: client id to its slots' updates."""
    params = join_clusters(clusters)
    cohort = Cohort(1, {number: join_slots(clusters[:1]) for number in range(len(uploads))})
    replies = [
        Upload(number, name, (examples or {}).get(name, 1.0), join_slots(slots), None, True, {}, 0, bytes(16))
        for number, (name, slots) in enumerate(uploads.items())
    ]
    return aggregator(params, cohort, replies, state or ClusterState())


def partition(labels):
    """Return which rows are together, whatever the labels are."""
    return {frozenset(np.flatnonzero(np.asarray(labels) == label).tolist()) for label in labels}


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_finds_clear_clusters(seed):
    tasks = [0, 1, 2, 1, 0, 2, 2, 1, 0, 0]
    assert partition(kmeans(blobs(tasks, seed), 3, seed=seed)) == partition(tasks)


def test_kmeans_agrees_with_scikit_learns():
    from sklearn.cluster import KMeans

    points = np.random.default_rng(0).normal(size=(30, 200))  # no clusters at all: only the best start agrees

    def inertia(labels):
        return sum(np.square(points[g] - points[g].mean(axis=0)).sum() for g in map(list, partition(labels)))

    theirs = KMeans(4, n_init=100, random_state=0).fit(points)
    assert inertia(kmeans(points, 4, seed=0)) <= theirs.inertia_ * 1.01


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


@given(st.permutations(range(3)), st.permutations(range(3)))
def test_names_of_clusters_do_not_depend_on_those_that_kmeans_gives(names, order):
    tasks = [0, 0, 1, 2, 1]
    points, former = blobs(tasks), CENTRES[list(order)]
    expected = [order.index(task) for task in tasks]
    assert match([names[task] for task in tasks], points, former) == expected


def test_each_cluster_moves_to_the_mean_of_its_members():
    clusters = [adapter(0, 0), adapter(9, 9), adapter(-9, 9)]
    uploads = {"a": [adapter(9, 8), adapter(1, 0)], "b": [adapter(0, 1), adapter(-9, 8)], "c": [adapter(9, 11)]}
    params, state, metrics, _ = aggregate(ClusterMean(3), clusters, uploads)
    expected = [adapter(0.5, 0.5), adapter(9, 9.5), adapter(-9, 8)]
    for found, wanted in zip(split_clusters(params), expected, strict=True):
        np.testing.assert_allclose(found["w"], wanted["w"])
    assert state.assignment == {"a": (1, 0), "b": (0, 2), "c": (1,)}
    assert metrics == {"adapters": 5, "clusters": 3}


def test_weighted_clusters_count_examples():
    uploads = {"a": [adapter(0, 0)], "b": [adapter(4, 4)]}
    params = aggregate(ClusterMean(1, weighted=True), [adapter(0, 0)], uploads, examples={"b": 3.0}).params
    np.testing.assert_allclose(params["cluster-0/w"], [3, 3])


def test_an_empty_cluster_keeps_its_adapter_and_absent_clients_their_clusters():
    clusters = [adapter(0, 0), adapter(9, 9), adapter(-9, 9)]
    state = ClusterState(assignment={"a": (1,), "z": (2, 0)})
    params, state, metrics, _ = aggregate(ClusterMean(3), clusters, {"a": [adapter(9, 7)]}, state)
    np.testing.assert_array_equal(params["cluster-0/w"], [0, 0])
    np.testing.assert_array_equal(params["cluster-1/w"], [9, 7])
    np.testing.assert_array_equal(params["cluster-2/w"], [-9, 9])
    assert state.assignment == {"a": (1,), "z": (2, 0)}
    assert metrics == {"adapters": 1, "clusters": 1}


def test_a_round_without_adapters_changes_nothing():
    clusters, state = [adapter(1, 2)], ClusterState(assignment={"a": (0,)})
    params, after, *_ = aggregate(ClusterMean(1), clusters, {}, state)
    np.testing.assert_array_equal(params["cluster-0/w"], [1, 2])
    assert after == state


def test_cluster_accuracy_is_that_of_the_best_matching():
    tasks = {"a": (0, 1), "b": (0,), "c": (1, 2)}
    assert cluster_accuracy({"a": (2, 0), "b": (2,), "c": (0, 1)}, tasks) == 1.0
    assert cluster_accuracy({"a": (2, 2), "b": (2,), "c": (0, 1)}, tasks) == pytest.approx(4 / 5)
    assert cluster_accuracy({"a": (2, 0), "unknown": (1, 1, 1)}, tasks) == 1.0
    assert clusters_of_tasks({}, tasks) == {}


def test_slots_and_clusters_come_apart_as_they_were_put_together():
    adapters = [adapter(1, 2), adapter(3, 4)]
    assert split_slots(join_slots(adapters), 2) == adapters
    assert split_clusters(join_clusters(adapters)) == adapters
    assert list(join_slots(adapters)) == ["slot-0/w", "slot-1/w"]
    assert count_slots(join_slots(adapters)) == 2


def test_arrays_without_prefix_are_one_adapter():
    plain = adapter(1, 2)
    assert split_slots(plain, 1)[0] is split_clusters(plain)[0] is plain
    assert count_slots(adapter(1, 2)) == 1


def test_a_slot_that_was_not_sent_starts_from_slot_0():
    assert [a["w"][0] for a in split_slots(join_slots([adapter(1), adapter(2)]), 4)] == [1, 2, 1, 1]


@pytest.mark.parametrize(
    "arrays",
    [
        {},
        {"slot-1/w": np.zeros(1, np.float32)},
        {"slot-0/w": np.zeros(1, np.float32), "slot-2/w": np.zeros(1, np.float32)},
        {"slot-0/w": np.zeros(1, np.float32), "slot-1/v": np.zeros(1, np.float32)},
        {"slot-0/w": np.zeros(1, np.float32), "slot-1/w": np.zeros(2, np.float32)},
    ],
)
def test_other_arrays_are_no_slots(arrays):
    with pytest.raises(SchemaMismatchError):
        split_slots(arrays, 1)


def test_arrays_without_slots_are_one_adapter():
    assert split_slots(adapter(1), 2) == [adapter(1)] * 2
    assert count_slots(adapter(1)) == 1


def test_params_are_made_of_one_adapter_or_taken_as_they_are():
    params = replicate(adapter(1, 2), 3)
    assert [a["w"].tolist() for a in split_clusters(params)] == [[1, 2]] * 3
    assert replicate(params, 3) is params
    with pytest.raises(SchemaMismatchError, match="expected 2 clusters, got 3"):
        replicate(params, 2)


def test_impossible_options_are_refused():
    with pytest.raises(ConfigError, match="num_clusters"):
        ClusterMean(0)


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr("fedkit.aggregation.cluster.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"fedkit\[cluster\]"):
        ClusterMean(2)
