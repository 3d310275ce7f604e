"""Laws of one round of TAC: means by cluster, odd adapters, and any other aggregation inside a cluster."""

from dataclasses import replace

import numpy as np
import pytest

from fedkit.aggregation import arrivals
from fedkit.aggregation.cluster import Clustered, ClusterState
from fedkit.aggregation.compensate import compensated
from fedkit.aggregation.lazy import LazyMean
from fedkit.aggregation.mean import MaskedMean, Mean
from fedkit.aggregation.missing import Missing
from fedkit.aggregation.product import ProductMean
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.aggregation.slots import count_slots, join_clusters, join_slots, replicate, split_clusters, split_slots
from fedkit.aggregation.tasks import Tasks
from fedkit.errors import SchemaMismatchError


def adapter(*values):
    return {"w": np.array(values, np.float32)}


CLUSTERS = [adapter(0, 0), adapter(9, 9), adapter(-9, 9)]


def clustered(num_clusters=3, inner=None, **options):
    return Clustered(Tasks(num_clusters, **options), inner or Mean(weighted=False))


def aggregate(aggregator, clusters, uploads, state=None, *, examples=None, sent=None, masks=None, server_round=1):
    """One round; everybody is sent cluster 0's adapter, or `sent`. `uploads`: the slots' updates, by client."""
    params = join_clusters(clusters)
    start = {number: join_slots((sent or {}).get(name, clusters[:1])) for number, name in enumerate(uploads)}
    ids = dict(enumerate(uploads))
    replies = [
        Upload(
            number,
            name,
            (examples or {}).get(name, 1.0),
            join_slots(slots) if slots else None,
            masks and join_slots(masks[name]),
            server_round == 1,
            {},
            0,
            bytes([server_round]) * 16,
        )
        for number, (name, slots) in enumerate(uploads.items())
        if slots is not None
    ]
    state = aggregator.init(params) if state is None else state
    return aggregator(params, Cohort(server_round, start, ids, everybody=True), replies, state)


def values(params):
    return [a["w"].tolist() for a in split_clusters(params)]


def test_each_cluster_moves_to_the_mean_of_its_members():
    uploads = {"a": [adapter(9, 8), adapter(1, 0)], "b": [adapter(0, 1), adapter(-9, 8)], "c": [adapter(9, 11)]}
    params, state, metrics, _ = aggregate(clustered(), CLUSTERS, uploads)
    np.testing.assert_allclose(values(params), [[0.5, 0.5], [9, 9.5], [-9, 8]])
    assert state.assignment == {"a": (1, 0), "b": (0, 2), "c": (1,)}
    assert metrics == {"adapters": 5, "clusters": 3}


def test_weighted_clusters_count_examples():
    uploads = {"a": [adapter(0, 0)], "b": [adapter(4, 4)]}
    params = aggregate(clustered(1, Mean()), CLUSTERS[:1], uploads, examples={"b": 3.0}).params
    np.testing.assert_allclose(values(params), [[3, 3]])


def test_an_empty_cluster_keeps_its_adapter_and_absent_clients_their_clusters():
    state = ClusterState(CLUSTERS[0], {"a": (1,), "z": (2, 0)})
    params, state, metrics, _ = aggregate(clustered(), CLUSTERS, {"a": [adapter(9, 7)]}, state)
    np.testing.assert_allclose(values(params), [[0, 0], [9, 7], [-9, 9]])
    assert state.assignment == {"a": (1,), "z": (2, 0)}
    assert metrics == {"adapters": 1, "clusters": 1}


def test_a_round_without_adapters_changes_nothing():
    state = ClusterState(CLUSTERS[0], {"a": (0,)})
    params, after, *_ = aggregate(clustered(1), CLUSTERS[:1], {}, state)
    np.testing.assert_array_equal(values(params), [[0, 0]])
    assert after.assignment == state.assignment


@pytest.mark.parametrize("huge", [1e3, 1e17])
def test_a_huge_adapter_is_set_aside_and_neither_takes_a_cluster_nor_moves_one(huge):
    good = {"a": [adapter(1, 0)], "b": [adapter(0, 1)], "c": [adapter(0, -1)], "d": [adapter(0, 1)]}
    all_, sent = {**good, "e": [adapter(huge, -huge)]}, dict.fromkeys("cd", CLUSTERS[1:2])
    with_it, state, metrics, _ = aggregate(clustered(2), CLUSTERS[:2], all_, sent=sent)
    np.testing.assert_allclose(
        values(with_it), values(aggregate(clustered(2), CLUSTERS[:2], good, sent=sent).params)
    )
    assert metrics == {"adapters": 5, "clusters": 2, "set-aside": 1}
    assert state.assignment["e"] in {(0,), (1,)}
    plain = clustered(2, screened=False)
    assert np.abs(values(aggregate(plain, CLUSTERS[:2], all_, sent=sent).params)).max() > 100


def test_who_is_set_aside_keeps_its_cluster():
    state = ClusterState(CLUSTERS[0], {"e": (1,)})
    uploads = {"a": [adapter(1, 0)], "b": [adapter(9, 8)], "c": [adapter(9, 10)], "e": [adapter(-1e6, 0)]}
    assert aggregate(clustered(2), CLUSTERS[:2], uploads, state).state.assignment["e"] == (1,)


def test_what_is_decoded_twice_comes_to_the_same(monkeypatch):
    monkeypatch.setattr(arrivals, "KEPT", 0)
    uploads = {"a": [adapter(9, 8), adapter(1, 0)], "b": [adapter(0, 1), adapter(-9, 8)], "c": [adapter(9, 11)]}
    calls = []

    def again(name):
        def decode():
            calls.append(name)
            return join_slots(uploads[name]), None

        return decode

    class Reopened(Clustered):
        def __call__(self, params, cohort, replies, state):
            replies = [replace(reply, again=again(reply.client_id)) for reply in replies]
            return super().__call__(params, cohort, replies, state)

    params = aggregate(Reopened(Tasks(3), Mean(weighted=False)), CLUSTERS, uploads).params
    np.testing.assert_array_equal(values(params), values(aggregate(clustered(), CLUSTERS, uploads).params))
    assert sorted(calls) == ["a", "a", "b", "b", "c"]


# ---- other aggregations inside a cluster ---------------------------------------------------------


def test_a_slot_that_changes_its_cluster_is_averaged_as_it_is():
    """Its update was of another adapter: what counts is where it arrived."""
    sent = {"a": [CLUSTERS[1]], "b": [CLUSTERS[0]]}
    uploads = {"a": [adapter(-9, -8)], "b": [adapter(2, 1)]}  # both arrive near cluster 0
    state = ClusterState(CLUSTERS[0], {"a": (1,), "b": (0,), "c": (2,)})
    step = aggregate(clustered(), CLUSTERS, uploads, state, sent=sent)
    assert step.state.assignment["a"] == (0,)
    np.testing.assert_allclose(values(step.params), [[1, 1], [9, 9], [-9, 9]])


def test_masked_slots_are_averaged_over_those_that_sent_an_entry():
    aggregator = clustered(2, MaskedMean(weighted=False))
    uploads = {"a": [adapter(2, 0)], "b": [adapter(4, 1)], "c": [adapter(0, 8)], "d": [adapter(9, 0)]}
    masks = {name: [{"w": slots[0]["w"] != 0}] for name, slots in uploads.items()}
    sent = {"c": [CLUSTERS[1]], "d": [CLUSTERS[1]]}
    params = aggregate(aggregator, CLUSTERS[:2], uploads, sent=sent, masks=masks).params
    np.testing.assert_allclose(values(params), [[3, 1], [18, 17]])


def test_a_missing_slot_is_stood_in_for_by_its_kin_in_the_cluster():
    aggregator = compensated(clustered(2), Missing("safari", warmup_rounds=1, own=False))
    uploads = {
        "a": [adapter(1, 1)],
        "b": [adapter(2, 2)],
        "c": [adapter(-9, 1), adapter(3, 3)],
        "d": [adapter(-8, 0)],
    }
    params, state, *_ = aggregate(aggregator, [adapter(0, 0)] * 2, uploads)
    clusters = split_clusters(params)
    kept = {name: [clusters[k] for k in labels] for name, labels in state.assignment.items()}
    later = {"a": [adapter(1, 1)], "c": [adapter(-1, 0), adapter(1, 1)]}
    step = aggregate(aggregator, clusters, later, state, sent=kept, server_round=2)
    assert step.stand_ins == {"b": "a", "d": "c"}
    assert step.metrics["surrogates"] == 2
    for k, (before, after) in enumerate(zip(values(params), values(step.params), strict=True)):
        own = [
            u for n, us in later.items() for u, label in zip(us, state.assignment[n], strict=True) if label == k
        ]
        np.testing.assert_allclose(np.subtract(after, before), own[0]["w"], atol=1e-6)


def test_warm_up_counts_rounds_and_not_clusters():
    aggregator = compensated(clustered(3), Missing("safari", warmup_rounds=2))
    uploads = {"a": [adapter(0, 1), adapter(9, 8)], "b": [adapter(1, 0), adapter(-9, 8)]}
    state = aggregate(aggregator, CLUSTERS, uploads).state
    assert (state.inner.rounds, state.inner.latest) == (1, 1)
    state = aggregate(aggregator, CLUSTERS, uploads, state, server_round=2).state
    assert (state.inner.rounds, state.inner.latest) == (2, 2)


def test_a_missing_slot_counts_with_its_last_update_under_mifa():
    aggregator = compensated(clustered(2), Missing("mifa"))
    uploads = {"a": [adapter(1, 1)], "b": [adapter(3, 3)], "c": [adapter(9, 9)]}
    sent = {"c": CLUSTERS[1:2]}
    params, state, *_ = aggregate(aggregator, CLUSTERS[:2], {**uploads, "c": [adapter(0, 0)]}, sent=sent)
    np.testing.assert_allclose(values(params), [[2, 2], [9, 9]])
    step = aggregate(aggregator, split_clusters(params), {"a": [adapter(1, 1)]}, state, server_round=2)
    np.testing.assert_allclose(values(step.params), [[4, 4], [9, 9]])  # the mean of a's 1 and b's last 3


def test_a_lazy_sum_steps_along_what_it_has_from_every_slot_of_a_cluster():
    aggregator = clustered(2, LazyMean(weighted=False))
    sent = {"c": CLUSTERS[1:2]}
    uploads = {"a": [adapter(1, 1)], "b": [adapter(3, 3)], "c": [adapter(0, -2)]}
    params, state, *_ = aggregate(aggregator, CLUSTERS[:2], uploads, sent=sent)
    np.testing.assert_allclose(values(params), [[2, 2], [9, 7]])
    assert set(aggregator.digests(state)) == {"a", "b", "c"}
    clusters = split_clusters(params)
    silent = {"a": [adapter(2, 0)], "b": [], "c": []}  # a adds to its 1; the others say nothing
    step = aggregate(aggregator, clusters, silent, state, server_round=2)
    np.testing.assert_allclose(values(step.params), [[2 + (3 + 3) / 2, 2 + (1 + 3) / 2], [9, 5]])


def test_a_slot_of_a_lazy_sum_takes_what_it_sent_along_to_another_cluster():
    aggregator = clustered(2, LazyMean(weighted=False))
    uploads = {"a": [adapter(1, 1)], "b": [adapter(8, 8)], "c": [adapter(9, 9)], "d": [adapter(0, 0.5)]}
    _, state, *_ = aggregate(aggregator, CLUSTERS[:2], uploads)
    assert state.assignment == {"a": (0,), "b": (1,), "c": (1,), "d": (0,)}
    moved = {"a": [adapter(8, 8)], "b": [], "c": [], "d": []}  # now 9: near b and c
    step = aggregate(aggregator, CLUSTERS[:2], moved, state, server_round=2)
    assert step.state.assignment["a"] == (1,)
    np.testing.assert_allclose(values(step.params)[1], np.add([9, 9], [26 / 3] * 2), rtol=1e-6)
    np.testing.assert_allclose(values(step.params)[0], [0, 0.5])


def test_products_are_averaged_inside_a_cluster():
    def lora(b, a):
        return {
            "l.lora_A.weight": np.array([a], np.float32),
            "l.lora_B.weight": np.array([[x] for x in b], np.float32),
        }

    start = lora([0, 0], [1, 1])
    uploads = {"a": [lora([1, 0], [0, 0])], "b": [lora([0, 1], [0, 0])], "c": [lora([-2, -2], [0, 0])]}
    aggregator = clustered(2, ProductMean(weighted=False))
    params, state, metrics, _ = aggregate(aggregator, [start] * 2, uploads)
    found = split_clusters(params)[state.assignment["a"][0]]
    product = found["l.lora_B.weight"] @ found["l.lora_A.weight"]
    np.testing.assert_allclose(product, [[0.5, 0.5], [0.5, 0.5]], atol=1e-6)
    assert metrics["lora-gap"] < 1e-6


# ---- slots ---------------------------------------------------------------------------------------


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
