"""How LoRA factors are averaged: what stays, what travels, and what the server ends with."""

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.aggregation.lora import LORA_GAP
from fedkit.aggregation.product import ProductMean
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.broadcast import receive
from fedkit.clients import AquilaMod, ErrorFeedbackMod
from fedkit.clients.shares import completed
from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.message import from_arrays, to_arrays
from fedkit.parcel import read_parcel
from fedkit.rounds import RoundGrid
from fedkit.strategies import Aquila, ErrorFeedback, Plain, Safari, Tac
from fedkit.submodels import lora_rank
from tests.helpers.grid import InProcessGrid

A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "head"
NUM, R = 4, 8
OPTIONS = {"fraction_evaluate": 0.0, "min_train_nodes": NUM, "min_available_nodes": NUM}
DENSE = OPTIONS | {"downlink": None}
RANKS = {f"r{r}": lora_rank(r) for r in (2, 4)}


def begin(r=R):
    a = np.random.default_rng(0).normal(size=(r, 12)).astype(np.float32) / 3
    return {A: a, B: np.zeros((10, r), np.float32), HEAD: np.zeros(3, np.float32)}


def goal(client):
    """A product of rank 1 for each client."""
    rng = np.random.default_rng([1, client])
    return np.outer(rng.normal(size=10), rng.normal(size=12)).astype(np.float32)


def app_of(client, mods, *, frozen=(), seen=None, rate=0.05):
    """Least squares: some gradient steps of ‖BA − goal‖²/2."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message, context):
        ((record),) = message.content.array_records.values()
        local = {name: array.copy() for name, array in to_arrays(record).items()}
        if seen is not None:
            seen.append({name: array.copy() for name, array in local.items()})
        for _ in range(5):
            error = local[B] @ local[A] - goal(client)
            steps = {A: local[B].T @ error, B: error @ local[A].T}
            for name in {A, B} - set(frozen):
                local[name] = (local[name] - rate * steps[name]).astype(np.float32)
        local[HEAD] = local[HEAD] + np.float32(client)
        content = {"arrays": from_arrays(local), "metrics": MetricRecord({"num-examples": 1 + client})}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        ((record),) = message.content.array_records.values()
        if seen is not None:
            seen.append(to_arrays(record))
        return Message(RecordDict({"metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


class Recorder:
    """A mod outside ours that keeps what goes over the wire."""

    def __init__(self):
        self.down, self.up = [], []

    def __call__(self, message, context, call_next):
        parcel = read_parcel(message.content)
        self.down.append(receive(parcel, {}))
        reply = call_next(message, context)
        self.up += [a.data for r in reply.content.array_records.values() for a in r.values()]
        return reply


def run(strategy, rounds=6, *, frozen=(), faults=None, held=("",) * NUM, spies=(), seen=None, evaluate_fn=None):
    mods = [*spies, AquilaMod(), ErrorFeedbackMod()]
    grid = InProcessGrid([app_of(i, mods, frozen=frozen, seen=seen if i == 1 else None) for i in range(NUM)])
    for context, name in zip(grid.contexts.values(), held, strict=True):
        if name:
            context.node_config["submodel"] = name
    rounds_grid = RoundGrid(grid, faults=faults)
    result = strategy.start(rounds_grid, from_arrays(begin()), rounds, evaluate_fn=evaluate_fn)
    gaps = [m.get(LORA_GAP) for m in result.train_metrics_clientapp.values()]
    return to_arrays(result.arrays), gaps, rounds_grid.ledger


def rejected(ledger, rounds):
    return sum(ledger.round_totals(k)["rejected"] for k in range(1, rounds + 1))


# ---- frozen A ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "strategy",
    [
        lambda: Aquila(lora="ffa", gap=True, beta=0.3, **OPTIONS),
        lambda: Aquila(lora="ffa", gap=True, beta=0.3, **DENSE),
        lambda: ErrorFeedback(lora="ffa", gap=True, **OPTIONS),
        lambda: Plain(lora="ffa", gap=True, **DENSE),
    ],
)
def test_a_frozen_a_never_changes_and_the_mean_of_products_is_exact(strategy):
    params, gaps, ledger = run(strategy(), frozen=[A], faults=Faults(drop=0.2, seed=1))
    assert params[A].tobytes() == begin()[A].tobytes()
    assert params[B].any()
    assert params[HEAD].any()
    assert rejected(ledger, 6) == 0
    assert max(gaps) < 1e-5


def test_with_plain_averaging_there_is_a_gap():
    for strategy in (Plain(gap=True, **DENSE), Aquila(gap=True, **DENSE)):
        _, gaps, _ = run(strategy)
        assert max(gaps) > 0.01
    _, gaps, _ = run(Plain(**DENSE))
    assert gaps == [None] * 6


def test_a_frozen_a_is_in_no_upload():
    recorder = Recorder()
    run(Plain(lora="ffa", **DENSE), 2, frozen=[A], spies=[recorder])
    assert {len(frame) for frame in recorder.up} == {len(recorder.up[0])}
    assert 4 * (10 * R + 3) < len(recorder.up[0]) < 4 * (10 * R + 3) + 40


def test_a_coded_downlink_does_not_touch_a_frozen_a():
    seen = []
    run(Aquila(lora="ffa", **OPTIONS), frozen=[A], seen=seen)
    assert len(seen) == 6
    assert all(arrays[A].tobytes() == begin()[A].tobytes() for arrays in seen)
    assert seen[-1][B].any()


def test_an_app_that_trains_it_is_refused_with_the_remedy(caplog):
    params, _, ledger = run(Plain(lora="ffa", **DENSE), 1)
    assert rejected(ledger, 1) == NUM
    assert "freeze_lora_a" in caplog.text
    assert not params[B].any()


def test_frozen_a_with_mixed_ranks():
    params, _, ledger = run(Aquila(lora="ffa", submodels=RANKS, **DENSE), frozen=[A], held=("r2", "r4", "", "r4"))
    assert params[A].tobytes() == begin()[A].tobytes()
    assert params[B].any(axis=0).all()
    assert rejected(ledger, 6) == 0


# ---- a B of one's own ----------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Plain, Aquila, ErrorFeedback])
def test_bs_never_travel_and_each_client_gets_its_own_back(make):
    recorder, seen = Recorder(), []
    options = DENSE | {"fraction_evaluate": 1.0, "min_evaluate_nodes": NUM}
    params, _, ledger = run(make(lora="fedsa", **options), spies=[recorder], seen=seen)
    assert rejected(ledger, 6) == 0
    assert all(sent[B].size == 0 for sent in recorder.down)
    assert not params[B].any()
    if make is Plain:
        assert max(map(len, recorder.up)) < 4 * (12 * R + 3) + 40
    assert not seen[0][B].any()
    assert np.linalg.norm(seen[-1][B] @ seen[-1][A] - goal(1)) < 0.3 * np.linalg.norm(goal(1))
    assert seen[1][B].tobytes() == seen[2][B].tobytes(), "evaluation, then training, with the same B"


def test_it_survives_lost_replies_and_mixed_ranks():
    seen = []
    params, _, ledger = run(
        Aquila(lora="fedsa", submodels=RANKS, **DENSE),
        12,
        held=("r2", "r4", "", "r4"),
        faults=Faults(drop=0.3, seed=2),
        seen=seen,
    )
    assert rejected(ledger, 12) == 0
    assert seen[-1][B].shape == (10, 4)
    assert seen[-1][B].any(axis=0).all()
    assert (params[A] != begin()[A])[:4].any(axis=1).all()


def test_a_b_of_another_rank_begins_at_zero():
    sent = {A: np.ones((3, 12), np.float32), B: np.zeros((10, 0), np.float32)}
    assert completed(sent, "fedsa", {"aquila.own": b"damaged"}, "aquila")[B].shape == (10, 3)


# ---- products ------------------------------------------------------------------------------------


def test_the_product_is_the_true_mean_if_the_rank_suffices():
    history = []

    def keep(_, arrays):
        history.append(to_arrays(arrays))

    _, gaps, ledger = run(Plain(lora="product", **DENSE), 1, evaluate_fn=keep)
    assert rejected(ledger, 1) == 0
    true = np.zeros((10, 12))
    for client in range(NUM):
        local = {name: array.copy() for name, array in history[0].items()}
        for _ in range(5):
            error = local[B] @ local[A] - goal(client)
            steps = {A: local[B].T @ error, B: error @ local[A].T}
            for name in (A, B):
                local[name] = (local[name] - 0.05 * steps[name]).astype(np.float32)
        true += (1 + client) / 10 * local[B] @ local[A]
    true_r = np.linalg.svd(true)[1]
    truncated = np.linalg.norm(true_r[R:]) / np.linalg.norm(true_r)
    assert gaps[0] == pytest.approx(truncated, abs=1e-5)
    assert np.linalg.norm(history[1][B] @ history[1][A] - true) <= (truncated + 1e-5) * np.linalg.norm(true)


def test_products_of_mixed_ranks_come_close_to_the_mean_of_the_goals():
    held = ("r2", "r4", "", "r4")
    mean = sum((1 + i) / 10 * goal(i) for i in range(NUM))
    params, gaps, ledger = run(
        Plain(lora="product", submodels=RANKS, **DENSE), 60, held=held, faults=Faults(drop=0.1, seed=4)
    )
    assert rejected(ledger, 60) == 0
    assert max(gaps) < 0.3
    assert np.linalg.norm(params[B] @ params[A] - mean) < 0.6 * np.linalg.norm(mean)


def test_changes_of_products_are_products_where_all_ranks_are_the_same():
    one, _, _ = run(Plain(lora="product", **DENSE), 5)
    other, _, _ = run(Plain(lora="product-update", **DENSE), 5)
    np.testing.assert_allclose(other[B] @ other[A], one[B] @ one[A], rtol=1e-4, atol=1e-5)


def test_who_holds_less_shrinks_the_rest_of_a_product_but_not_of_its_changes():
    """Nobody trains, so nothing should change."""
    rng = np.random.default_rng(0)
    params = {A: rng.normal(size=(R, 12)).astype(np.float32), B: rng.normal(size=(10, R)).astype(np.float32)}
    before, small = params[B] @ params[A], {A: params[A][:2], B: params[B][:, :2]}
    like = {name: np.zeros_like(array) for name, array in params.items()}
    low = {A: np.vstack([small[A], like[A][2:]]), B: np.hstack([small[B], like[B][:, 2:]])}
    cohort = Cohort(1, {1: params, 2: low})
    uploads = [Upload(i, str(i), 1.0, like, None, True, {}, 0, bytes(16)) for i in (1, 2)]
    found = {kind: ProductMean(True, kind)(params, cohort, uploads, None).params for kind in (False, True)}
    after = {kind: arrays[B] @ arrays[A] for kind, arrays in found.items()}
    np.testing.assert_allclose(after[True], before, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after[False], (before + low[B] @ low[A]) / 2, rtol=1e-4, atol=1e-4)


def test_nothing_is_remembered_of_uploads():
    strategy = Plain(lora="product", **DENSE)
    run(strategy, 3)
    assert strategy.registry.accepted == {}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Aquila(lora="product", **DENSE), "product: not with Aquila"),
        (lambda: Aquila(lora="product-update", **DENSE), "product-update: not with Aquila"),
        (lambda: ErrorFeedback(lora="product", **DENSE), "product: not with ErrorFeedback"),
        (lambda: Plain(lora="product"), "all factors are new in every round"),
        (lambda: Aquila(lora="fedsa"), "not sent all arrays"),
        (lambda: Aquila(lora="mean"), "expected one of factors, ffa, fedsa, product"),
        (lambda: Safari(lora="product", **DENSE), "product: not with Safari"),
        (lambda: Tac(num_clusters=2, lora="fedsa"), "fedsa: not with Tac"),
    ],
)
def test_what_does_not_compose_is_refused_with_the_reason(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()


def test_a_b_that_begins_elsewhere_is_refused():
    strategy = Aquila(lora="fedsa", **DENSE)
    arrays = begin() | {B: np.ones((10, R), np.float32)}
    with pytest.raises(ConfigError, match="begins at zero"):
        strategy.start(InProcessGrid([]), from_arrays(arrays), 1)
