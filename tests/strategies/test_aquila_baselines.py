"""The methods that AQUILA is compared with, each against its rule written down in a few lines."""

import zlib

import numpy as np
import pytest

from fedkit.arrays import flatten
from fedkit.codec.baselines import Qsgd
from fedkit.errors import ConfigError
from fedkit.faults import Event, Faults
from fedkit.limits import Limits
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.skipping import SkipRule
from fedkit.state import ClientState
from fedkit.strategies import Aquila, Marina, Plain
from fedkit.strategies.contents import mean_metrics
from fedkit.strategies.loss_levels import LossLevels
from tests.helpers.gradient import SIZE, Quadratic, app_of
from tests.helpers.grid import InProcessGrid, VirtualTime
from tests.helpers.quadratic import LIKE

NUM, RATE, ROUNDS = 4, 0.3, 25
PROBLEMS = [Quadratic.draw(seed, 0.7) for seed in range(NUM)]
EVERYBODY = {"fraction_evaluate": 0.0, "min_train_nodes": NUM}
CUTS = np.cumsum([a.size for a in LIKE.values()])[:-1]


def run(strategy, rounds=ROUNDS, faults=None):
    """Return the parameters, what each client sent, and the grid."""
    seen = [[] for _ in PROBLEMS]
    inner = InProcessGrid([app_of(p, RATE, seen=s) for p, s in zip(PROBLEMS, seen, strict=True)])
    grid = RoundGrid(inner, faults=faults)
    result = strategy.start(grid, from_arrays(LIKE), num_rounds=rounds)
    return flatten(to_arrays(result.arrays)), seen, inner


def gradients(theta):
    """What each client's update is: one step of SGD."""
    return [
        (theta.astype(np.float64) - RATE * p.gradient(theta.astype(np.float64))).astype(np.float32) - theta
        for p in PROBLEMS
    ]


def coded(values, quantizer, server_round, client):
    """The values as they travel, drawn as the mod draws."""
    rng = np.random.default_rng([server_round, zlib.crc32(str(client).encode())])
    parts = np.split(values, CUTS) if quantizer.per_array else [values]
    return np.concatenate([g.dequantize(levels) for g, levels in (quantizer.quantize([p], rng) for p in parts)])


def mean(vectors):
    return np.mean(np.stack(vectors).astype(np.float64), axis=0).astype(np.float32)


def test_qsgd_sends_every_update_and_remembers_nothing():
    theta = np.zeros(SIZE, np.float32)
    for k in range(1, ROUNDS + 1):
        theta = theta + mean([coded(u, Qsgd(4), k, m) for m, u in enumerate(gradients(theta))])
    strategy = Plain.qsgd(4, **EVERYBODY)
    ours, seen, grid = run(strategy)
    np.testing.assert_allclose(ours, theta, rtol=1e-4, atol=1e-5)
    assert {sent.bits for s in seen for sent in s} == {4}
    assert strategy.state is None
    states = [ClientState(c, strategy.progress.experiment).load() for c in grid.contexts.values()]
    assert not any(name.startswith("aquila") for state in states for name in state)


def test_laq_skips_by_its_own_rule():
    """Its ten last steps, thrice the errors now and then, and a clock."""
    rule, bits = SkipRule.laq(history=10, weight=0.08, patience=6), 4
    theta, steps, skips = np.zeros(SIZE, np.float32), [], []
    q, last, clock = [np.zeros(SIZE, np.float32)] * NUM, [0.0] * NUM, [0] * NUM
    strategy = Aquila.laq(bits, rule=rule, **EVERYBODY)
    for k in range(1, ROUNDS + 1):
        skips.append([])
        for m, update in enumerate(gradients(theta)):
            v = update - q[m]
            dq = coded(v, strategy.codec.quantizer, k, m)
            error, size = (float(np.square(x.astype(np.float64)).sum()) for x in (v - dq, dq))
            enough = size >= sum(0.08 * s for s in steps[:10]) + 3 * (error + last[m]) or clock[m] >= 6
            skips[-1].append(k > 1 and not enough)
            if skips[-1][-1]:
                clock[m] += 1
            else:
                q[m], last[m], clock[m] = q[m] + dq, error, 0
        new = theta + mean(q)
        steps.insert(0, float(np.square((new - theta).astype(np.float64)).sum()))
        theta = new
    ours, seen, _ = run(strategy)
    assert [[s[k].bits == 0 for s in seen] for k in range(ROUNDS)] == skips
    assert {sent.bits for s in seen for sent in s} == {0, bits}
    np.testing.assert_allclose(ours, theta, rtol=1e-4, atol=1e-5)
    longest = max(len(run_) for s in seen for run_ in "".join("s" if x.bits == 0 else " " for x in s).split())
    assert longest == 6, "patience ended a silence"


def test_an_upload_that_was_lost_leaves_laqs_past_as_it_was():
    """The error of the last upload is that of the last one which arrived."""
    lost = Faults(events=(Event(2, "1", lost=True),))
    strategy = Aquila.laq(4, rule=SkipRule.laq(weight=0.0, patience=1000), **EVERYBODY)
    _, seen, grid = run(strategy, 8, faults=lost)
    (context,) = [c for c in grid.contexts.values() if c.node_config["partition-id"] == 1]
    assert "aquila.past" in ClientState(context, strategy.progress.experiment).load()
    assert seen[1][2].bits > 0, "what was lost is sent again"


def test_the_levels_follow_the_loss():
    losses = []

    def note(contents, weighted_by_key):
        metrics = mean_metrics(contents, weighted_by_key)
        losses.append(metrics["train-loss"])
        return metrics

    _, seen, _ = run(Plain.adaquantfl(3.0, train_metrics_aggr_fn=note, **EVERYBODY))
    widths = [next((s[k].bits for s in seen if s[k].bits), None) for k in range(ROUNDS)]
    for k, width in enumerate(widths[1:], 1):
        levels = np.ceil(3 * np.sqrt(losses[0] / losses[k - 1]))
        assert width in (None, 1 + int(np.ceil(np.log2(levels + 1))))
    assert max(filter(None, widths)) > widths[0]


def test_marina_sends_differences_and_sometimes_all():
    theta, estimate, before = np.zeros(SIZE, np.float32), None, None
    strategy = Marina(whole=0.2, **EVERYBODY)
    ours, seen, _ = run(strategy)
    whole = [s.bits == 32 for s in seen[0]]
    assert all([s[k].bits == 32 for k in range(ROUNDS)] == whole for s in seen), "a coin for all"
    assert 1 < sum(whole) < ROUNDS / 2
    for k in range(1, ROUNDS + 1):
        now = gradients(theta)
        if whole[k - 1]:
            estimate = mean(now)
        else:
            differences = [coded(u - b, Qsgd(4), k, m) for m, (u, b) in enumerate(zip(now, before, strict=True))]
            estimate = estimate + mean(differences)
        before, theta = now, theta + estimate
    np.testing.assert_allclose(ours, theta, rtol=1e-4, atol=1e-5)


def test_marina_is_silent_after_a_loss_until_all_send_everything():
    lost = Faults(events=(Event(3, "2", lost=True),))
    strategy = Marina(quantizer=Qsgd(8), whole=0.2, seed=1, **EVERYBODY)
    _, seen, _ = run(strategy, faults=lost)
    whole = [k for k, s in enumerate(seen[0], 1) if s.bits == 32]
    again = next(k for k in whole if k > 3)
    assert again > 4, "choose another seed"
    assert [s.bits for s in seen[2][3 : again - 1]] == [0] * (again - 4)
    assert all(s.bits for s in seen[2][again - 1 :])


@pytest.mark.parametrize("client", ["0", "3"])
def test_a_whole_update_that_comes_too_late_for_marina_is_as_good_as_lost(client):
    found = []
    for event in (Event(1, client, lost=True), Event(1, client, delay=0.5)):
        inner = InProcessGrid([app_of(p, RATE) for p in PROBLEMS])
        limits, slow = Limits(quorum=0.5, grace=0.3, deadline=60.0), Event(2, "1", delay=0.2)
        grid = RoundGrid(inner, faults=Faults(events=(event, slow)), limits=limits, clock=VirtualTime())
        result = Marina(whole=1e-9, **EVERYBODY).start(grid, from_arrays(LIKE), num_rounds=5)
        found.append(flatten(to_arrays(result.arrays)))
    assert sum(grid.ledger.round_totals(k)["late"] for k in range(1, 6)) == 1
    np.testing.assert_array_equal(*found)


def test_published_forms_differ_from_fedavg_only_in_what_they_say():
    """At 16 bits, and if nobody may skip, each of them is FedAvg."""
    theta = np.zeros(SIZE, np.float32)
    for _ in range(ROUNDS):
        theta = theta + mean(gradients(theta))
    never = SkipRule((), patience=0)
    for strategy in (
        Plain.qsgd(16, **EVERYBODY),
        Aquila.laq(16, rule=never, **EVERYBODY),
        Marina(quantizer=Qsgd(16), **EVERYBODY),
    ):
        ours, _, _ = run(strategy)
        assert np.linalg.norm(ours - theta) < 1e-3 * np.linalg.norm(theta)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Marina(fraction_train=0.5), "every client in every round"),
        (lambda: Marina(whole=0.0), "a chance above 0"),
        (lambda: Aquila(step_size=-1.0), "step_size"),
        (lambda: Plain(step_size=0.5, lora="product", downlink=None), "there is no step"),
        (lambda: Plain(levels=LossLevels()), "expected the quantizer Qsgd"),
        (lambda: LossLevels(0.5), "at least 1 level"),
        (lambda: SkipRule.laq(patience=-1), "patience"),
    ],
)
def test_impossible_options_are_refused(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()
