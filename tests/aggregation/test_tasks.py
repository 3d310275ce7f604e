"""The rules of TAC's clustering: absent tasks, free clusters, odd adapters, how many clusters there are."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkit.aggregation.identities import (
    adjusted_rand_index,
    cluster_accuracy,
    clusters_of_tasks,
    match,
    purity,
)
from fedkit.aggregation.tasks import Tasks, overlong, silhouette
from fedkit.errors import ConfigError
from tests.aggregation.test_kmeans import CENTRES, blobs, partition

ALL = (0, 1, 2)


def label(rules, tasks, former=CENTRES, held=ALL, clients=None, seed=0):
    names = clients or [str(i) for i in range(len(tasks))]
    return rules.label(names, blobs(tasks, seed), former, held)


@pytest.mark.parametrize("seed", range(5))
def test_a_task_that_nobody_sends_splits_no_other(seed):
    tasks = [0, 0, 0, 2, 2, 2, 2]
    assert label(Tasks(3), tasks, seed=seed) == tasks
    plain = label(Tasks(3, anchored=False), tasks, seed=seed)
    assert len(set(plain)) == 3, "as published, it does"


def test_one_adapter_alone_joins_its_own_cluster():
    assert label(Tasks(3), [1]) == [1]


def test_fewer_adapters_than_clusters_change_as_many_clusters():
    assert partition(label(Tasks(5), [0, 2], former=np.zeros((5, 3)), held=())) == partition([0, 2])


def test_a_task_of_one_client_keeps_its_cluster():
    tasks = [0, 0, 0, 0, 1, 2, 2, 2, 2]
    assert label(Tasks(3), tasks) == tasks


def test_a_new_task_takes_a_cluster_that_is_free():
    former = np.vstack([CENTRES[:2], np.zeros((1, 3))])  # the third is still v^0
    assert label(Tasks(3), [0, 0, 1, 1, 2], former=former, held=(0, 1)) == [0, 0, 1, 1, 2]


def test_a_merged_cluster_comes_apart_again():
    """Two tasks that began in one cluster, beside an odd one: their adapters decide, not the clusters."""
    former = np.stack([(CENTRES[0] + CENTRES[1]) / 2, CENTRES[2], CENTRES[2] + 0.5])
    tasks = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert partition(label(Tasks(3), tasks, former=former)) == partition(tasks)


def test_a_copy_does_not_push_its_twin_into_a_foreign_cluster():
    points = blobs([0, 0, 0, 1, 1, 1])
    points[5] = points[4] = points[0]  # the last client sends one adapter of another's, twice
    clients = ["a", "b", "c", "d", "e", "e"]
    assert Tasks(2).label(clients, points, CENTRES[:2], (0, 1)) == [0, 0, 0, 1, 0, 0]


@given(st.permutations(range(3)), st.permutations(range(3)))
def test_names_of_clusters_do_not_depend_on_those_that_kmeans_gives(names, order):
    tasks = [0, 0, 1, 2, 1]
    points, former = blobs(tasks), CENTRES[list(order)]
    expected = [order.index(task) for task in tasks]
    assert match([names[task] for task in tasks], points, former) == expected


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_number_of_clusters_is_found(count):
    """In many dimensions, as adapters have, where noise has no structure."""
    rng = np.random.default_rng(0)
    tasks = [i % count for i in range(12)]
    points = rng.normal(size=(3, 200))[tasks] + rng.normal(size=(12, 200))
    rules = Tasks(6, number="at-most")
    assert partition(rules.label("abcdefghijkl", points, np.zeros((6, 200)), ())) == partition(tasks)


def test_no_fewer_clusters_than_a_client_has_slots():
    tasks = [0, 0, 0, 0]
    clients = ["a", "a", "b", "b"]
    found = label(Tasks(4, number="at-most"), tasks, former=np.zeros((4, 3)), held=(), clients=clients)
    assert len(set(found)) >= 2


def test_silhouettes_are_scikit_learns():
    from sklearn.metrics import silhouette_score

    points, labels = blobs([0, 1, 2, 1, 0, 2, 0]), [0, 1, 2, 1, 0, 0, 3]
    assert silhouette(points, labels, seed=0) == pytest.approx(silhouette_score(points, labels))
    assert silhouette(points, [0] * 7, seed=0) == 0


def test_ari_is_scikit_learns_and_purity_the_books():
    from sklearn.metrics import adjusted_rand_score

    rng = np.random.default_rng(0)
    found, true = rng.integers(0, 4, 30).tolist(), rng.integers(0, 3, 30).tolist()
    ours = adjusted_rand_index({"a": found}, {"a": true})
    assert ours == pytest.approx(adjusted_rand_score(true, found))
    book = (
        {"x": (0,) * 6 + (1,) * 6 + (2,) * 5},
        {"x": (0,) * 5 + (1,) + (0,) + (1,) * 4 + (2,) + (0,) * 2 + (2,) * 3},
    )
    assert purity(*book) == pytest.approx(12 / 17)  # figure 16.1
    assert adjusted_rand_index({"a": (0,)}, {"a": (1,)}) == 1.0


def test_cluster_accuracy_is_that_of_the_best_matching():
    tasks = {"a": (0, 1), "b": (0,), "c": (1, 2)}
    assert cluster_accuracy({"a": (2, 0), "b": (2,), "c": (0, 1)}, tasks) == 1.0
    assert cluster_accuracy({"a": (2, 2), "b": (2,), "c": (0, 1)}, tasks) == pytest.approx(4 / 5)
    assert cluster_accuracy({"a": (2, 0), "unknown": (1, 1, 1)}, tasks) == 1.0
    assert clusters_of_tasks({}, tasks) == {}


def test_odd_lengths_are_those_far_beyond_the_usual_spread():
    assert overlong([1, 1.1, 0.9, 3.9, 1]).tolist() == [False] * 5
    assert overlong([1, 1.1, 0.9, 4.5, 1]).tolist() == [False, False, False, True, False]
    assert not overlong([1, 3, 10, 0.3, 30]).any(), "lengths that differ anyway"
    assert overlong([1, 3, 10, 0.3, 1e9]).tolist() == [False] * 4 + [True]
    assert not overlong([0.0, 0.0]).any()
    assert not overlong([0.0, 0.0, 0.0, 2.0]).any(), "who did not move has no say"
    assert overlong([]).tolist() == []


def test_impossible_options_are_refused(monkeypatch):
    for options, message in [
        ({"num_clusters": 0}, "num_clusters"),
        ({"num_clusters": 2, "number": "some"}, "number: expected one of given, at-most, got 'some'"),
        ({"num_clusters": 2, "signature": "gram"}, "signature"),
    ]:
        with pytest.raises(ConfigError, match=message):
            Tasks(**options)
    monkeypatch.setattr("fedkit.aggregation.tasks.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"fedkit\[cluster\]"):
        Tasks(2)
