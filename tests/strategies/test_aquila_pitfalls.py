"""What goes wrong with AQUILA when it is written down carelessly, one test for each."""

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedkit.arrays import flatten
from fedkit.clients import AquilaMod
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread, adaptive_bits
from fedkit.codec.wire import Codec, decode, open_frame
from fedkit.faults import Event, Faults
from fedkit.memory import ClientMemory
from fedkit.message import from_arrays, read_instructions, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.skipping import SkipRule
from fedkit.state import ClientState
from fedkit.strategies import Aquila
from tests.helpers.gradient import SIZE, Quadratic, app_of, optimum
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, client_app, targets

NUM, RATE = 4, 0.5
PROBLEMS = [Quadratic.draw(seed, 0.7) for seed in range(NUM)]
EVERYBODY = {"downlink": None, "weighted": False, "fraction_evaluate": 0.0, "min_train_nodes": NUM}
RNG = np.random.default_rng(0)


def run(strategy, rounds, *, faults=None, **options):
    """Return the parameters, the grid, and what each client sent."""
    seen = [[] for _ in PROBLEMS]
    apps = [app_of(p, RATE, seen=s, **options) for p, s in zip(PROBLEMS, seen, strict=True)]
    grid = RoundGrid(InProcessGrid(apps), faults=faults)
    result = strategy.start(grid, from_arrays(LIKE), num_rounds=rounds)
    return flatten(to_arrays(result.arrays)).astype(np.float64), grid, seen


def round_trip(quantizer, values):
    ((group, levels),) = [quantizer.quantize([values], RNG)]
    return group.dequantize(levels)


# ---- the quantizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [RNG.normal, RNG.laplace, lambda size: RNG.uniform(-1, 1, size)])
def test_at_one_bit_the_published_grid_never_settles_and_ours_does(draw):
    """For a constant gradient: there is no zero, so what is nearly right is moved by ±R again."""
    gradient = draw(size=4810).astype(np.float32)

    def left(quantizer):
        known = np.zeros_like(gradient)
        for _ in range(40):
            known += round_trip(quantizer, gradient - known)
        return np.linalg.norm(gradient - known) / np.linalg.norm(gradient)

    assert left(AquilaMidTread(max_bits=1)) > 0.3
    assert left(AquilaMidTread()) > 0.3, "b* stays at 1"
    assert left(AquilaMidTread(min_bits=2)) < 1e-3
    assert left(ZeroMidTread()) < 1e-3


@pytest.mark.parametrize("bits", range(1, 9))
def test_the_levels_fit_into_b_bits(bits):
    """An implementation that rounds to multiples of ``2R / (2^b − 1)`` has 2^b + 1 levels."""
    values = np.linspace(-1, 1, 10_001).astype(np.float32)
    for quantizer in (AquilaMidTread(bits, bits), *([ZeroMidTread(bits, bits)] if bits > 1 else [])):
        _, levels = quantizer.quantize([values], RNG)
        assert levels.min() == 0
        assert levels.max() < 2**bits


@pytest.mark.parametrize("quantizer", [AquilaMidTread(), ZeroMidTread()])
def test_an_innovation_of_zeros_takes_no_bits(quantizer):
    """R = 0 would be 0 / 0."""
    assert adaptive_bits(np.zeros(5, np.float32), 1, 16) == 0
    assert not round_trip(quantizer, np.zeros(5, np.float32)).any()
    assert not round_trip(quantizer, np.zeros(0, np.float32)).size


def test_a_client_whose_gradient_did_not_change_skips():
    still = Quadratic(np.ones(SIZE), np.zeros(SIZE))
    grid = RoundGrid(InProcessGrid([app_of(still, RATE)] * NUM))
    Aquila.published(beta=0.0, **EVERYBODY).start(grid, from_arrays(LIKE), num_rounds=2)
    counts = [grid.ledger.round_totals(k)["skips"] for k in (1, 2)]
    assert counts == [0, NUM], "the server must have zeros from all of them before they may skip"


def test_levels_are_computed_in_float64_and_clipped():
    """The largest entry, and sizes where float32 cannot tell two levels apart."""
    for scale in (1e-38, 1.0, 3e38):
        values = (np.array([1, -1, 0.3, -0.7, 1], np.float64) * scale).astype(np.float32)
        for bits in (1, 8, 16):
            group, levels = AquilaMidTread(bits, bits).quantize([values], RNG)
            step = 2 * np.float64(scale) / (2**bits - 1)
            assert levels.max() == 2**bits - 1
            error = np.abs(group.dequantize(levels).astype(np.float64) - values)
            assert error.max() <= step / 2 * (1 + 1e-6) + np.spacing(np.float32(scale))


def test_both_sides_add_the_same_bits():
    values = {name: RNG.normal(size=a.shape).astype(np.float32) for name, a in LIKE.items()}
    frame = Codec(AquilaMidTread()).encode(values)
    there, here = decode(frame, like=LIKE), open_frame(frame, like=LIKE).arrays()
    assert all(there[name].tobytes() == here[name].tobytes() for name in LIKE)


def test_bits_are_those_of_the_frame():
    """b per entry, R and b, and a header; the downlink is counted, too."""
    _, grid, seen = run(Aquila.published(beta=0.0, **EVERYBODY), 10)
    for k in range(1, 11):
        totals = grid.ledger.round_totals(k)
        paper = sum(s[k - 1].bits * SIZE + 40 for s in seen) / 8
        assert totals["uplink-frame-bytes"] <= paper + NUM * 40
        assert totals["downlink-bytes"] > NUM * SIZE * 4


# ---- the skip rule ---------------------------------------------------------------------------------


def test_nobody_skips_the_first_round():
    """There is no former model, and with a difference of 0 an upload of zeros alone would pass."""
    _, grid, _ = run(Aquila.published(beta=1e6, **EVERYBODY), 1)
    assert grid.ledger.round_totals(1)["skips"] == 0


def test_when_all_skip_the_model_moves_by_the_lazy_sum():
    _, grid, _ = run(Aquila.published(beta=1e6, **EVERYBODY), 2)
    assert grid.ledger.round_totals(2)["skips"] == NUM
    one, _, _ = run(Aquila.published(beta=1e6, **EVERYBODY), 1)
    five, _, _ = run(Aquila.published(beta=1e6, **EVERYBODY), 5)
    np.testing.assert_allclose(five, 5 * one, rtol=1e-5)


def test_a_large_beta_diverges():
    """Why `beta` is not simply set high: everybody repeats what was right once."""
    best = optimum(PROBLEMS)
    near, _, _ = run(Aquila(beta=0.1, **EVERYBODY), 20)
    far, _, _ = run(Aquila(beta=1e6, **EVERYBODY), 20)
    assert np.linalg.norm(near - best) < 0.1 * np.linalg.norm(best) < np.linalg.norm(far - best)


def test_beta_is_free_of_scale():
    """``(β/α²) ‖θ^k − θ^{k−1}‖² = β ‖q̄‖²``: gradients a thousand times as large change nothing."""
    rule = SkipRule.aquila(0.5)
    assert rule.threshold([4.0]) * 1e6 == rule.threshold([4.0e6])
    large = [Quadratic(1e3 * p.target, p.curvature) for p in PROBLEMS]
    strategy = Aquila.published(beta=4.0, **EVERYBODY)
    seen = [[] for _ in large]
    grid = RoundGrid(InProcessGrid([app_of(p, RATE, seen=s) for p, s in zip(large, seen, strict=True)]))
    strategy.start(grid, from_arrays(LIKE), num_rounds=12)
    _, _, same = run(Aquila.published(beta=4.0, **EVERYBODY), 12)
    assert [[sent.bits for sent in s] for s in seen] == [[sent.bits for sent in s] for s in same]


def test_the_step_size_of_a_schedule_is_that_which_made_the_step():
    """θ^k − θ^{k−1} was made with α of round k − 1, whatever α is now."""
    schedule = {1: 0.5, 2: 0.25, 3: 0.125}
    strategy = Aquila.published(beta=1.0, step_size=schedule.__getitem__, **EVERYBODY)
    grid = InProcessGrid([app_of(p, None) for p in PROBLEMS])
    arrays, before = [from_arrays(LIKE)], LIKE
    for k in (1, 2, 3):
        messages = strategy.configure_train(k, arrays[-1], ConfigRecord(), grid)
        if k > 1:
            now = to_arrays(arrays[-1])
            step = sum(float(np.square((now[n] - before[n]).astype(np.float64)).sum()) for n in now)
            told = read_instructions(messages[0]).options["skip-threshold"]
            assert told == pytest.approx(step / schedule[k - 1] ** 2, rel=1e-6)
        before = to_arrays(arrays[-1])
        arrays.append(strategy.aggregate_train(k, grid.send_and_receive(messages))[0])


def test_noise_of_mini_batches_leaves_little_to_skip():
    skips = {}
    for noise in (0.0, 0.5):
        _, grid, _ = run(Aquila(beta=0.5, **EVERYBODY), 20, noise=noise)
        skips[noise] = sum(grid.ledger.round_totals(k)["skips"] for k in range(1, 21))
    assert skips[0.5] < skips[0.0] / 4


# ---- who is there, and what arrives ----------------------------------------------------------------


def beliefs(grid, strategy):
    """Return what each client believes the server has from it, and what the server has."""
    pairs = []
    inner = grid.inner if not hasattr(grid.inner, "inner") else grid.inner.inner
    for context in inner.contexts.values():
        state = ClientState(context, strategy.progress.experiment).load()
        name = str(context.node_config["partition-id"])
        accepted = strategy.registry.accepted.get(name, bytes(16))
        pairs.append((ClientMemory(state, "aquila", like=LIKE).settle(accepted), strategy.state.memory[name]))
    return pairs


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_lost_upload_does_not_part_client_and_server(fraction):
    """After every loss both sides hold the same q_m, bit for bit, with all clients or some."""
    options = EVERYBODY | {"min_train_nodes": 2, "min_available_nodes": NUM, "fraction_train": fraction}
    strategy = Aquila(beta=0.1, **options)
    _, grid, _ = run(strategy, 25, faults=Faults(seed=3, drop=0.4))
    assert sum(grid.ledger.round_totals(k)["missing"] for k in range(1, 26)) > 10
    for client, server in beliefs(grid, strategy):
        assert all(client[name].tobytes() == server[name].tobytes() for name in LIKE)


def test_who_missed_rounds_is_told_the_threshold_of_now():
    """A device that kept its own θ^{k−1} would compare over several rounds and skip too much."""
    strategy = Aquila(beta=1.0, **EVERYBODY)
    grid, arrays, before = InProcessGrid([app_of(p, RATE) for p in PROBLEMS]), from_arrays(LIKE), None
    for k in range(1, 6):
        messages, params = strategy.configure_train(k, arrays, ConfigRecord(), grid), flatten(to_arrays(arrays))
        step = 0.0 if before is None else float(np.square((params - before).astype(np.float64)).sum())
        told = [read_instructions(message).options["skip-threshold"] for message in messages]
        assert told == pytest.approx([step] * NUM)
        heard = messages if k in (1, 5) else messages[:-1]  # the last node misses three rounds
        before, (arrays, _) = params, strategy.aggregate_train(k, grid.send_and_receive(heard))


def test_who_comes_late_uploads_whatever_the_threshold():
    strategy = Aquila(beta=1e6, **{**EVERYBODY, "min_train_nodes": 1, "min_available_nodes": 1})
    events = tuple(Event(k, "3", lost=True) for k in range(1, 4))
    _, _, seen = run(strategy, 5, faults=Faults(events=events))
    assert "3" in strategy.state.memory
    assert [sent.bits > 0 for sent in seen[3]][:5] == [True] * 4 + [False]


def test_nan_is_refused_and_nothing_is_forgotten():
    broken = [False]

    def tamper(local):
        return {n: np.full_like(a, np.nan) for n, a in local.items()} if broken[0] else local

    sound = [client_app([AquilaMod()], target) for target in targets(NUM)[1:]]
    strategy, arrays, kept = Aquila(beta=0.0, **EVERYBODY), from_arrays(LIKE), []
    grid = InProcessGrid([client_app([AquilaMod()], targets(NUM)[0], tamper=tamper), *sound])
    for k in (1, 2, 3):
        broken[0] = k == 2
        replies = grid.send_and_receive(strategy.configure_train(k, arrays, ConfigRecord(), grid))
        assert [reply.has_error() for reply in replies] == [k == 2, False, False, False]
        arrays, _ = strategy.aggregate_train(k, replies)
        kept.append(strategy.state.memory["0"])
    assert all(kept[0][name].tobytes() == kept[1][name].tobytes() for name in LIKE)
    assert any((kept[1][name] != kept[2][name]).any() for name in LIKE)


def test_buffers_spoil_the_scale_of_all_unless_each_array_has_its_own():
    """A counter among the arrays, as BatchNorm has one: in gradient mode an app leaves buffers out."""
    weights = RNG.normal(size=100).astype(np.float32)
    update = {"weight": weights, "num_batches_tracked": np.array([1e4], np.float32)}

    def error(quantizer):
        coded = decode(Codec(quantizer).encode(update), like=update)["weight"]
        return np.linalg.norm(coded - weights) / np.linalg.norm(weights)

    assert error(AquilaMidTread()) > 10
    assert error(ZeroMidTread()) < 0.6
