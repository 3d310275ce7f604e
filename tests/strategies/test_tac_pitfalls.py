"""What goes wrong with FL-TAC, point by point, and that it does not here; laws over many rounds."""

import logging

import numpy as np
import pytest

from fedkit.aggregation.identities import adjusted_rand_index, cluster_accuracy
from fedkit.aggregation.slots import split_clusters
from fedkit.aggregation.tasks import Tasks
from fedkit.errors import SchemaMismatchError
from fedkit.faults import Faults
from fedkit.message import from_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Tac
from tests.aggregation.test_signatures import A, B, lora, rows
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, initial
from tests.strategies.test_tac import TASKS, by_task, client, clients, everybody, flat, goals, run


def assignments(strategy, apps, rounds, faults=None):
    """Return the assignment after every round."""
    seen = []
    grid = RoundGrid(InProcessGrid(apps), faults=faults)
    strategy.start(
        grid, initial(), num_rounds=rounds, evaluate_fn=lambda k, arrays: seen.append(strategy.state.assignment)
    )
    return seen[1:]


# ---- stable identities ---------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "evidence"), [(0, "adapters"), (1, "adapters"), (2, "adapters"), (0, "updates")])
def test_no_cluster_changes_its_number_in_20_rounds_with_30_percent_missing(seed, evidence):
    strategy = Tac(num_clusters=3, evidence=evidence, **everybody())
    seen = assignments(strategy, clients(), 20, Faults(drop=0.3, seed=seed, start_round=2))
    final = dict(seen[-1])
    assert cluster_accuracy(final, TASKS) == 1.0
    for assignment in seen:
        assert {name: final[name] for name in assignment} == assignment


@pytest.mark.parametrize("seed", range(3))
def test_clusters_hold_if_few_clients_are_asked(seed):
    """Two of six in each round, so that tasks are absent from most; at most one slot began wrong, and stays."""
    few = {"fraction_evaluate": 0.0, "fraction_train": 0.34, "min_train_nodes": 1, "min_available_nodes": 6}

    def accuracies(**options):
        seen = assignments(Tac(num_clusters=3, seed=seed, **options, **few), clients(), 24)
        return [cluster_accuracy(assignment, TASKS) for assignment in seen[-10:]]

    ours = accuracies()
    assert min(ours) > 0.9
    assert len(set(ours)) == 1
    assert np.mean(accuracies(anchored=False)) < np.mean(ours), "as published, they do not"


def test_a_task_that_is_absent_splits_no_other():
    absent = Faults(rates={"1": 1.0, "2": 1.0, "3": 1.0, "5": 1.0}, start_round=3)  # all that hold task 2
    strategy = Tac(num_clusters=3, **everybody())
    params, _ = run(strategy, clients(), rounds=2)
    before = flat(by_task(params, strategy)[2])
    strategy = Tac(num_clusters=3, **everybody())
    params, _ = run(strategy, clients(), rounds=6, faults=absent)
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    np.testing.assert_allclose(flat(by_task(params, strategy)[2]), before, atol=1e-6)


def test_one_adapter_of_many_steps_keeps_the_cluster_of_its_lone_client():
    """A task of one client, which is missing for rounds: nobody takes its cluster meanwhile."""
    tasks = {"0": (0, 1), "1": (0,), "2": (1,), "3": (2,)}
    apps = [client([goals(int(name), task) for task in own]) for name, own in tasks.items()]
    strategy = Tac(num_clusters=3, **everybody(4))
    params, _ = run(strategy, apps, rounds=12, faults=Faults(rates={"3": 1.0}, start_round=4))
    assert cluster_accuracy(strategy.state.assignment, tasks) == 1.0
    lone = split_clusters(params)[strategy.state.assignment["3"][0]]
    assert np.linalg.norm(flat(lone) - flat(goals(3, 2))) < 0.5 * np.linalg.norm(flat(goals(3, 2)))


# ---- what adapters look like ---------------------------------------------------------------------


def test_what_all_adapters_share_does_not_count():
    """B starts at 0, so that early adapters are mostly the A that all begin with: distances do not see it."""
    rng = np.random.default_rng(0)
    points, shared = (
        rng.normal(size=(12, 40)) + 3 * rng.normal(size=(3, 40))[[0, 1, 2] * 4],
        1e4 * rng.normal(size=40),
    )
    names = [str(i) for i in range(12)]
    plain = Tasks(3).label(names, points, np.zeros((3, 40)), ())
    moved = Tasks(3).label(names, points + shared, np.zeros((3, 40)) + shared, ())
    assert adjusted_rand_index({"a": plain}, {"a": moved}) == 1.0
    assert adjusted_rand_index({"a": plain}, {"a": [0, 1, 2] * 4}) == 1.0


def test_clients_that_begin_differently_are_told_apart_by_products_alone():
    """(BQ)(Q⁻¹A) is the same adapter: k-means of factors sees another."""
    rng, tasks, adapters = np.random.default_rng(0), [0, 1] * 6, []
    for number, task in enumerate(tasks):
        adapter, own = lora(r=2, seed=task), lora(r=2, seed=10 + number)
        q = np.linalg.qr(rng.normal(size=(2, 2)))[0].astype(np.float32) * np.float32(rng.choice([0.2, 1, 5]))
        moved = {name: adapter[name] + np.float32(0.1) * own[name] for name in adapter}
        adapters.append({**moved, A: np.linalg.inv(q).astype(np.float32) @ moved[A], B: moved[B] @ q})
    names = [str(i) for i in range(12)]

    def ari(kind):
        points = rows(kind, *adapters)
        return adjusted_rand_index({"a": Tasks(2).label(names, points, points[:2] * 0, ())}, {"a": tasks})

    assert ari("product") == 1.0
    assert ari("factors") < 0.5


def test_products_find_the_tasks_in_a_run():
    strategy = Tac(num_clusters=3, signature="product", **everybody())
    run(strategy, clients(), rounds=8)
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0


# ---- hostile and broken clients ------------------------------------------------------------------


def _huge(slots):
    return [{name: 1e6 * array + 1e6 for name, array in slot.items()} for slot in slots]


def _copied(slots):
    return [slots[0], slots[0]]


@pytest.mark.parametrize("tamper", [_huge, _copied])
def test_a_hostile_adapter_takes_no_cluster_and_ends_no_round(tamper):
    """A huge one moves nothing; one that is sent twice is in its task's cluster, both times."""
    bad = client([goals(0, 0), goals(0, 1)] if tamper is _copied else [goals(6, 0)], tamper=tamper)
    strategy = Tac(num_clusters=3, **everybody(7))
    params, grid = run(strategy, [*clients(), bad], rounds=8)
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    alone = Tac(num_clusters=3, **everybody())
    good, _ = run(alone, clients(), rounds=8)
    for ours, theirs in zip(by_task(params, strategy), by_task(good, alone), strict=True):
        assert np.abs(flat(ours) - flat(theirs)).max() < 0.3
    assert grid.ledger.round_totals(8)["replies"] == 7
    if tamper is _copied:
        assert len(set(strategy.state.assignment["6"])) == 1


def test_as_published_a_huge_adapter_takes_a_cluster():
    bad = client([goals(6, 0)], tamper=_huge)
    strategy = Tac.published(num_clusters=3, **everybody(7))
    params, _ = run(strategy, [*clients(), bad], rounds=2)
    assert np.abs(flat(params)).max() > 1e5
    assert cluster_accuracy(strategy.state.assignment, TASKS) < 1.0


def test_a_client_without_tasks_is_refused_and_the_round_goes_on(caplog):
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, grid = run(Tac(num_clusters=3, **everybody(7)), [*clients(), client([])], rounds=2)
    alone, _ = run(Tac(num_clusters=3, **everybody()), clients(), rounds=2)
    np.testing.assert_array_equal(flat(params), flat(alone))
    assert grid.ledger.round_totals(1)["rejected"] == 1


def test_equal_adapters_make_no_cluster_of_their_own():
    """More clusters than different adapters: clients that did not train, say."""
    idle = [client([LIKE], tamper=lambda slots: [dict(LIKE)]) for _ in range(4)]
    strategy = Tac(num_clusters=3, **everybody(4))
    params, _ = run(strategy, idle, rounds=3)
    assert len(set(strategy.state.assignment.values())) == 1
    np.testing.assert_array_equal(flat(params), 0)


# ---- what the server may know --------------------------------------------------------------------


def test_true_tasks_are_for_evaluation_alone(tmp_path):
    wrong = {name: labels[::-1] for name, labels in TASKS.items()}
    params, _ = run(Tac(num_clusters=3, tasks=wrong, checkpoint=tmp_path, **everybody()), clients())
    np.testing.assert_array_equal(flat(params), flat(run(Tac(num_clusters=3, **everybody()), clients())[0]))


def test_the_number_of_tasks_need_not_be_known():
    strategy = Tac(num_clusters=6, number="at-most", **everybody())
    params, _ = run(strategy, clients(), rounds=10)
    assert adjusted_rand_index(strategy.state.assignment, TASKS) == 1.0
    assert len({k for labels in strategy.state.assignment.values() for k in labels}) == 3
    assert len(split_clusters(params)) == 6


def test_a_run_goes_on_if_the_clusters_are_fewer_than_the_tasks():
    strategy = Tac(num_clusters=2, max_slots=3, **everybody())
    params, grid = run(strategy, clients(), rounds=4)
    assert np.isfinite(flat(params)).all()
    assert grid.ledger.round_totals(4)["rejected"] == 0


def test_arrays_of_other_clusters_are_refused():
    start = from_arrays({f"cluster-{k}/{name}": array for k in range(2) for name, array in LIKE.items()})
    with pytest.raises(SchemaMismatchError, match="expected 3 clusters, got 2"):
        run(Tac(num_clusters=3, **everybody()), clients(), start=start)
