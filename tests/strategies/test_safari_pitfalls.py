"""What goes wrong with SAFARI when it is written down carelessly, one test for each."""

import numpy as np
import pytest

from fedkit.aggregation.compensate import Compensated
from fedkit.aggregation.mean import MaskedMean, Mean
from fedkit.aggregation.missing import Missing
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.aggregation.similarity import Similarity, cosines, distances
from fedkit.clients.safari import load_mask, save_mask
from fedkit.codec.sparsify import density, prune_and_regrow, random_mask
from fedkit.codec.wire import Codec
from fedkit.faults import Event, Faults
from fedkit.message import Instructions
from fedkit.rounds import RoundGrid
from fedkit.strategies import Safari
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import initial, targets
from tests.strategies.test_safari import DENSE, LIKE, NUM, Spy, clients, flat, run

SIZE = 60
RNG = np.random.default_rng(0)
PARAMS = {"w": np.zeros(SIZE, np.float32)}


def upload(client, update, mask=None, weight=1.0):
    arrays = {"w": np.asarray(update, np.float32) * (1 if mask is None else mask)}
    kept = None if mask is None else {"w": mask}
    return Upload(int(client), client, weight, arrays, kept, False, {}, 0, b"")


def server(missing, inner=None):
    return Compensated(inner or Mean(), missing.settled(lasting=True))


def cohort(server_round, count):
    return Cohort(server_round, {}, {i: str(i) for i in range(count)}, everybody=True)


def play(rule, rounds, params=PARAMS):
    """Return what each round came to, given its uploads."""
    state, found = rule.init(params), []
    for k, uploads in enumerate(rounds, start=1):
        found.append(rule(params, cohort(k, 4), uploads, state))
        params, state = found[-1].params, found[-1].state
    return found


# ---- similarity ------------------------------------------------------------------------------------


def test_cold_start_a_pair_that_was_never_seen_together_has_no_surrogate():
    """Not the first of the list, nor whoever happens to be known: then the mean is over those that answered."""
    a, b, c = (RNG.normal(size=SIZE) for _ in range(3))
    rounds = [[upload("0", a), upload("1", b)], [upload("2", c)]]
    *_, last = play(server(Missing(own=False, warmup_rounds=0)), rounds)
    assert last.stand_ins == {}
    np.testing.assert_allclose(last.params["w"] - (a + b) / 2, c, atol=1e-6)


def test_cold_start_the_first_rounds_only_observe():
    same = RNG.normal(size=SIZE)
    rounds = [[upload("0", same), upload("1", same)], [upload("0", same)], [upload("0", same)]]
    found = play(server(Missing(own=False, warmup_rounds=2)), rounds)
    assert [each.stand_ins for each in found] == [{}, {}, {"1": "0"}]


def two_groups(count=5, share=0.4, noise=0.5):
    """Return updates and masks of two groups that pull in different directions; masks differ by client."""
    directions = RNG.normal(size=(2, 2000))
    updates = np.concatenate([d + noise * RNG.normal(size=(count, 2000)) for d in directions]).astype(np.float32)
    masks = RNG.random((2 * count, 2000)) < share
    return updates * 0.01, masks


def right(values, count=5):
    """Return how often the most similar of the others is of the same group."""
    values = values.copy()
    np.fill_diagonal(values, -np.inf)
    group = np.arange(2 * count) // count
    return float(np.mean(group[values.argmax(1)] == group))


def test_metric_the_distance_of_sparse_models_measures_masks():
    """Of models whose weights are much larger than their updates; cosines of updates find the group."""
    updates, masks = two_groups()
    weights = RNG.normal(size=2000).astype(np.float32)
    sparse = [np.where(mask, weights + update, 0) for update, mask in zip(updates, masks, strict=True)]
    sent = [update * mask for update, mask in zip(updates, masks, strict=True)]
    assert right(cosines(sent, list(masks))) == 1.0
    assert right(distances(sparse)) < 0.9


def test_metric_distances_of_different_rounds_do_not_compare():
    """They shrink as training goes on: whoever was compared last seems nearest. Cosines do not."""
    a, b = np.array([1.0, 0.0]), np.array([0.8, 0.6])
    early, late = (distances([k * a, k * b])[0, 1] for k in (1.0, 0.01))
    assert late > 10 * early, "minus the distance"
    assert cosines([a, b], [None, None])[0, 1] == pytest.approx(cosines([a / 100, b / 100], [None, None])[0, 1])


def test_metric_the_first_version_had_the_sign_wrong():
    near = Similarity().observe(
        ["0", "1", "2"], distances([np.zeros(2), np.ones(2), 9 * np.ones(2)]), keep_last=True
    )
    assert near.nearest("0", ["1", "2"])[0] == "1"


# ---- who stands in ---------------------------------------------------------------------------------


def test_nobody_answered_keeps_the_parameters():
    for missing in (Missing(), Missing("mifa"), Missing("reweight"), Missing(surrogate="update")):
        sent = [[upload("0", RNG.normal(size=SIZE)), upload("1", RNG.normal(size=SIZE))], []]
        first, second = play(server(missing), sent)
        np.testing.assert_array_equal(second.params["w"], first.params["w"])
        assert second.state.rounds == 1


def test_a_client_never_received_has_weight_zero_and_never_nan():
    faults = Faults(rates={"0": 1.0})
    params, result = run(Safari(**DENSE), clients(), rounds=5, faults=faults)
    others, _ = run(Safari(**DENSE), clients(), rounds=5, faults=faults)
    assert np.isfinite(flat(params)).all()
    assert all(m["surrogates"] == 0 for m in result.train_metrics_clientapp.values())
    np.testing.assert_array_equal(flat(params), flat(others))


def test_of_equals_the_lowest_id_stands_in():
    same = RNG.normal(size=SIZE)
    everybody = [upload(str(i), same) for i in range(4)]
    found = play(server(Missing(own=False, warmup_rounds=0)), [everybody, everybody[:3], everybody[1:3]])
    assert [each.stand_ins for each in found] == [{}, {"3": "0"}, {"0": "1", "3": "1"}]


def test_only_who_arrived_can_stand_in():
    """The most similar client of all may be missing, too."""
    a = RNG.normal(size=SIZE)
    c = a + RNG.normal(size=SIZE)
    first = [upload("0", a), upload("1", a), upload("2", c)]
    *_, last = play(server(Missing(own=False, warmup_rounds=0)), [first, [upload("2", c)]])
    assert last.stand_ins == {"0": "2", "1": "2"}


def test_a_stand_in_weighs_as_much_as_it_is_alike():
    """Measured: at full weight, where updates are mostly noise, stand-ins do more harm than good."""
    a, b = np.eye(2, SIZE)
    near, new, other = a + b, RNG.normal(size=SIZE), RNG.normal(size=SIZE)  # cosine of near and a: 0.707
    first = [upload("0", a), upload("1", near), upload("2", -a)]
    rule = server(Missing(own=False, warmup_rounds=0))
    before, last = play(rule, [first, [upload("1", new), upload("2", other)]])
    assert last.stand_ins == {"0": "1"}
    expected = (1.707107 * new + other) / 2.707107
    np.testing.assert_allclose(last.params["w"] - before.params["w"], expected, atol=1e-5)
    assert play(rule, [first, [upload("2", other)]])[-1].stand_ins == {}, "nobody is like his opposite"


def test_a_model_copied_is_not_an_update_added_to_its_own():
    """From where it was last, or from where its kin is: two algorithms, each by its name."""
    same, later = RNG.normal(size=(2, SIZE))
    rounds = [[upload("0", same), upload("1", same)], [upload("0", later)], [upload("0", later)]]
    copied, moved = (
        play(server(Missing(surrogate=s, own=False, warmup_rounds=0)), rounds) for s in ("model", "update")
    )
    np.testing.assert_allclose(copied[2].params["w"], same + 2 * later, rtol=1e-5)
    np.testing.assert_allclose(moved[1].params["w"], same + later, rtol=1e-5)
    np.testing.assert_allclose(moved[2].params["w"], same + 2 * later, rtol=1e-5)
    others = [[*r, upload("2", -same)] for r in rounds]  # where they part
    copied, moved = (
        play(server(Missing(surrogate=s, own=False, warmup_rounds=0)), others)[-1].params["w"]
        for s in ("model", "update")
    )
    assert not np.allclose(copied, moved, atol=1e-2)


def test_under_unbiased_loss_it_only_lowers_variance():
    """All clients alike but for noise: dropping is unbiased already, and nothing may get worse by surrogates."""
    rng, ends = np.random.default_rng(1), {"drop": [], "safari": []}
    direction = rng.normal(size=SIZE)
    for _ in range(20):
        lost = rng.random((12, 4)) < 0.5
        noisy = [[direction + 0.3 * rng.normal(size=SIZE) for _ in range(4)] for _ in range(12)]
        rounds = [
            [upload(str(i), u) for i, u in enumerate(r) if not gone[i]]
            for r, gone in zip(noisy, lost, strict=True)
        ]
        rounds[:2] = [[upload(str(i), u) for i, u in enumerate(r)] for r in noisy[:2]]
        rounds = [r for r in rounds if r]
        plain = sum(np.mean([u.arrays["w"] for u in r], axis=0) for r in rounds)
        ends["drop"].append(plain - len(rounds) * direction)
        ends["safari"].append(play(server(Missing()), rounds)[-1].params["w"] - len(rounds) * direction)
    off = {name: np.abs(np.mean(values)) for name, values in ends.items()}
    spread = {name: np.std(values) for name, values in ends.items()}
    assert off["safari"] < 0.2
    assert spread["safari"] < 1.5 * spread["drop"]


def test_a_byzantine_model_attracts_surrogates_only_if_it_is_like_them():
    """By distance a model near the middle is everybody's nearest; by cosine one that is long is nobody's."""
    honest = [RNG.normal(size=SIZE) + 3 for _ in range(3)]
    rounds = [[upload(str(i), u) for i, u in enumerate(honest)] + [upload("3", -100 * honest[0])]] * 2
    rounds.append([rounds[0][1], rounds[0][3]])
    *_, last = play(server(Missing(own=False)), rounds)
    assert last.stand_ins == {"0": "1", "2": "1"}


# ---- masks -----------------------------------------------------------------------------------------


def test_sparse_models_shrink_what_few_keep_and_owners_means_do_not():
    params = {"w": np.ones(4, np.float32)}
    masks = [np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)]
    sent = [upload(str(i), np.full(4, 0.5), mask) for i, mask in enumerate(masks)]
    whole = MaskedMean()(params, cohort(1, 2), sent, None).params["w"]
    np.testing.assert_allclose(whole, [1.5, 1.5, 1.5, 1.0])
    shrunk = MaskedMean(sparse_model=True)(params, cohort(1, 2), sent, None).params["w"]
    np.testing.assert_allclose(shrunk, [1.5, 0.75, 0.75, 0.0])


def test_a_lost_upload_does_not_part_the_masks():
    """The mask is the client's: the server has none of its own to grow stale, for every frame brings it along."""
    spies, lost = [], Faults(events=tuple(Event(k, "0", lost=True) for k in (2, 3, 4)))
    grids = [lambda g: spies.append(Spy(g)) or spies[-1]] * 2
    for faults, spy in zip((None, lost), grids, strict=True):
        run(Safari(density=0.3, **DENSE), clients(), rounds=6, faults=faults, spy=spy)
    for k in range(6):
        moved = [s.rounds[k][1000][1] for s in spies]
        for name, array in LIKE.items():
            assert moved[0][name].sum() == moved[1][name].sum() == round(0.3 * array.size)
    assert any((spies[1].rounds[1][1000][1][n] != spies[1].rounds[5][1000][1][n]).any() for n in LIKE)


def test_regrowing_takes_what_moved_most_among_what_is_not_kept():
    """Training is dense, so that no extra batch is needed: an entry outside the mask has its update, too."""
    mask = {"w": np.array([[True, True, False, False]])}
    update = {"w": np.array([[0.1, 0.9, 0.3, -0.7]], np.float32)}
    np.testing.assert_array_equal(prune_and_regrow(mask, update, update, 0.5)["w"], [[False, True, False, True]])


def test_what_regrows_starts_from_the_servers_value_and_no_optimizer_state_is_kept():
    """A ClientApp lives for one message: momentum of dropped weights has nowhere to stay."""
    apps, spies = clients(), []
    run(Safari(density=0.3, **DENSE), apps, rounds=4, spy=lambda g: spies.append(Spy(g)) or spies[0])
    theta, target = np.zeros(88), flat(targets(NUM)[0])
    for replies in spies[0].rounds:
        update, mask = (flat(part) for part in replies[1000])
        np.testing.assert_allclose(update[mask], 0.3 * (target - theta)[mask], atol=1e-5)
        sent = [(flat(u), flat(m)) for u, m in replies.values()]
        owners = sum(m.astype(int) for _, m in sent)
        theta = theta + np.divide(sum(u for u, _ in sent), owners, out=np.zeros(88), where=owners > 0)


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.5])
def test_biases_are_kept_whole_and_no_layer_collapses(share):
    like = {"conv": np.zeros((4, 3, 3, 3), np.float32), "bias": np.zeros(4, np.float32), "one": np.zeros((1, 1))}
    mask = random_mask(like, share, RNG)
    for _ in range(5):
        update = {name: RNG.normal(size=a.shape).astype(np.float32) for name, a in like.items()}
        mask = prune_and_regrow(mask, update, update, 1.0)
        assert mask["bias"].all()
        assert mask["conv"].sum() == max(1, round(share * 108))
        assert mask["one"].sum() == 1


def test_rewiring_nothing_is_possible():
    """k = 0: a share of the kept entries that is less than one of them, or nothing left to grow."""
    update = {"w": RNG.normal(size=(3, 3)).astype(np.float32)}
    few = random_mask(update, 0.4, RNG)
    for mask, rate in ((few, 0.1), ({"w": np.ones((3, 3), bool)}, 1.0)):
        np.testing.assert_array_equal(prune_and_regrow(mask, update, update, rate)["w"], mask["w"])
    assert density({"w": np.zeros((0, 3), bool)}) == 1.0


def test_the_published_anneal_ends_at_nothing():
    strategy = Safari.published(density=0.5, **DENSE | {"min_train_nodes": 2})
    strategy.num_rounds, rates = 10, []
    for k in (1, 5, 10):
        strategy._cohort = Cohort(k, {})
        rates.append(strategy.options({}, lambda arrays: arrays)["rewire"])
    np.testing.assert_allclose(rates, [0.025 * (1 + np.cos(np.pi * k / 10)) for k in (1, 5, 10)])


def test_whoever_misses_the_broadcast_trains_from_what_it_is_sent_next():
    """Only uplinks are lost in the paper; here a node that holds an old version is sent the changes it lacks."""
    strategy = Safari(density=0.5, fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    grid = RoundGrid(InProcessGrid(clients()), faults=Faults(events=(Event(3, "0", crash=True),)))
    strategy.start(grid, initial(), num_rounds=5)
    counts = [grid.ledger.round_totals(k) for k in range(1, 6)]
    assert [(c["replies"], c["rejected"]) for c in counts] == [(6, 0), (6, 0), (5, 0), (5, 1), (6, 0)]


def test_a_mask_is_of_some_arrays_at_some_density():
    """Another adapter, or another density, draws a new one instead of failing."""

    class Job:
        client_id, sent, state = "7", LIKE, {}
        instructions = Instructions("safari", 1, Codec(), b"", options={"density": 0.5, "seed": 0})

    first = load_mask(Job, like=LIKE)
    save_mask(Job, first)
    assert all((load_mask(Job, like=LIKE)[n] == first[n]).all() for n in LIKE)
    other = {"w": np.zeros((5, 5), np.float32)}
    assert load_mask(Job, like=other)["w"].sum() == 12
