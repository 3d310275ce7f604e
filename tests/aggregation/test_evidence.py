"""Laws of clustering by what slots sent in all rounds: wrong starts heal, and a sketch of the sums is kept."""

import numpy as np
import pytest

from fedkit import checkpoint
from fedkit.aggregation.alike import alike
from fedkit.aggregation.cluster import Clustered
from fedkit.aggregation.evidence import WIDTH, compared, summed, told
from fedkit.aggregation.identities import adjusted_rand_index
from fedkit.aggregation.kmeans import kmeans
from fedkit.aggregation.mean import Mean
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.aggregation.slots import join_slots, replicate, split_clusters
from fedkit.aggregation.tasks import Tasks
from fedkit.errors import ConfigError

TASKS = {str(i): ((0, 1), (1, 2), (2, 0), (0, 2, 1))[i % 4] for i in range(16)}
SIZE, ADAPTER = 600, "base.model.x.lora_{}.weight"


def shaped(row):
    """The row as one LoRA layer of rank 1, and a head."""
    a, b, head = np.split(row.astype(np.float32), [SIZE // 3, 2 * SIZE // 3])
    return {ADAPTER.format("A"): a[None], ADAPTER.format("B"): b[:, None], "head.weight": head}


def aggregator(**options):
    return Clustered(Tasks(3, **{"evidence": "updates", **options}), Mean(weighted=False))


def play(aggregator, rounds, *, signal=0.16, state=None, params=None, first=1, order=None, absent=(), after=0):
    """Clients whose updates are mostly noise; return params and state. `absent` answer up to round `after`."""
    towards = np.random.default_rng(0).normal(size=(3, SIZE))
    params = replicate(shaped(np.zeros(SIZE)), 3) if params is None else params
    state = aggregator.init(params) if state is None else state
    for server_round in range(first, first + rounds):
        clusters, sent, uploads = split_clusters(params), {}, []
        for number in order if order is not None else range(len(TASKS)):
            name = str(number)
            if name in absent and server_round > after:
                continue
            rng = np.random.default_rng([server_round, number])
            rows = [signal * towards[task] + rng.normal(size=SIZE) for task in TASKS[name]]
            own = state.assignment.get(name, (0,) * len(rows))
            sent[number] = join_slots([clusters[k] for k in own])
            arrays = join_slots([shaped(row) for row in rows])
            uploads.append(Upload(number, name, 1.0, arrays, None, server_round == 1, {}, 0, b""))
        cohort = Cohort(server_round, sent, {n: str(n) for n in sent}, everybody=not absent)
        result = aggregator(params, cohort, uploads, state)
        params, state = result.params, result.state
    return params, state


def found(state):
    return adjusted_rand_index(state.assignment, TASKS)


def test_a_slot_that_began_in_a_wrong_cluster_finds_its_own():
    """By adapters it stays where the first round put it, for its start is that cluster's."""
    by_adapters = aggregator(evidence="adapters")
    assert found(play(by_adapters, 6)[1]) < 0.3
    assert found(play(aggregator(), 1)[1]) < 0.3
    assert found(play(aggregator(), 6)[1]) == 1.0


def test_the_order_of_the_replies_says_nothing():
    order = np.random.default_rng(1).permutation(len(TASKS)).tolist()
    one, other = play(aggregator(), 5)[1], play(aggregator(), 5, order=order)[1]
    assert adjusted_rand_index(one.assignment, other.assignment) == 1.0


def test_a_resumed_run_clusters_alike(tmp_path):
    server = aggregator()
    whole, last = play(server, 4)
    params, state = play(server, 2)
    checkpoint.save(tmp_path, server.remember(state))
    state = server.recall(params, checkpoint.load(tmp_path), None)
    resumed, state = play(server, 2, params=params, state=state, first=3)
    assert state.assignment == last.assignment
    for name, array in whole.items():
        np.testing.assert_array_equal(resumed[name], array)


def test_slots_that_are_absent_keep_their_task_a_cluster():
    absent = [name for name, tasks in TASKS.items() if 2 in tasks]
    present = {name: tasks for name, tasks in TASKS.items() if name not in absent}
    _, state = play(aggregator(), 12, signal=0.5, absent=absent, after=4)
    assert found(state) == 1.0
    assert {len(state.assignment[name]) for name in present} == {2}


def test_of_a_slot_a_small_sketch_is_kept_that_sums_exactly_when_it_is_exact():
    _, state = play(aggregator(), 2)
    assert all(row.nbytes == 8 * WIDTH and count == 2 for count, row in state.evidence.values())
    rng = np.random.default_rng(0)
    large = [{"head": rng.normal(size=5 * WIDTH).astype(np.float32)} for _ in range(2)]
    start = {"head": np.zeros(5 * WIDTH, np.float32)}
    first, second = (told(start, update, "factors") for update in large)
    both = told(start, {"head": large[0]["head"] + large[1]["head"] / 2}, "factors")
    np.testing.assert_allclose(summed(summed(None, first), second)[1], both, atol=1e-4)


def test_products_do_not_say_how_an_adapter_is_scaled():
    """(2B)(A/2) is BA, before an update and after it; factors say something else."""
    start, update = shaped(np.arange(SIZE) / SIZE), shaped(np.ones(SIZE) / 9)
    scale = dict(zip(start, (0.5, 2, 1), strict=True))
    other = {name: np.float32(scale[name]) * array for name, array in start.items()}
    change = {name: np.float32(scale[name]) * array for name, array in update.items()}
    same = told(start, update, "product")
    np.testing.assert_allclose(told(other, change, "product"), same, rtol=1e-4, atol=1e-4)
    assert np.abs(told(other, change, "factors") - told(start, update, "factors")).max() > 0.01
    assert np.abs(same).max() > 0.01


def test_sums_are_compared_by_direction():
    """A client that answers half as often, or has half as long updates, is no further away."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(4, 2, WIDTH)).astype(np.float32)
    rows -= rows.mean(axis=0)
    points, former = compared({f"{i}#0": (1, row) for i, row in enumerate(rows)}, {"0": (1,), "9": (0,)}, 2)
    np.testing.assert_allclose(np.square(points).sum(axis=1), 2.0)
    np.testing.assert_array_equal(former, [np.zeros(2 * WIDTH), points[0]])


def test_rows_join_those_they_are_like_where_kmeans_ends_where_it_began():
    rng, tasks = np.random.default_rng(0), [0, 1, 2, 3, 4] * 8
    points = 0.2 * rng.normal(size=(5, 1500))[tasks] + rng.normal(size=(40, 1500))
    names = [str(i) for i in range(40)]
    plain = kmeans(points, 5, seed=0, owners=names)
    ours = alike(points, 5, seed=0, owners=names)
    assert adjusted_rand_index({"a": ours}, {"a": tasks}) == 1.0
    assert adjusted_rand_index({"a": plain}, {"a": tasks}) < 0.5


def test_rows_of_one_owner_are_apart_as_long_as_there_are_clusters():
    points = np.random.default_rng(0).normal(size=(8, 5))
    labels = alike(points, 3, seed=0, owners=list("aaabbccc"))
    assert [len(set(labels[:3])), len(set(labels[3:5])), len(set(labels[5:]))] == [3, 2, 3]
    assert max(alike(points, 2, seed=0, owners=list("aaabbccc"))) < 2
    assert len(alike(points[:1], 3, seed=0, owners=["a"], known=[1])) == 1


def test_an_unknown_evidence_is_refused():
    with pytest.raises(ConfigError, match="evidence"):
        aggregator(evidence="guesses")
