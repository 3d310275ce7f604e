"""What one node, or one careless line of a server, must not do to a run."""

import json

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedkit.arrays import flatten
from fedkit.broadcast import Broadcast
from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod
from fedkit.codec.quantize import ZeroMidTread
from fedkit.errors import ConfigError, QuorumError, ReplyError
from fedkit.message import FEDKIT, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Aquila, ErrorFeedback, Plain, Safari
from fedkit.strategies.registry import Registry
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import client_app, initial, targets

NUM = 4
OPTIONS = {"fraction_evaluate": 0.0, "min_train_nodes": 2, "min_available_nodes": NUM}
MODS = [AquilaMod(), ErrorFeedbackMod(), SafariMod()]


def apps(*, change=None, **options):
    """Return the apps of all nodes; `change` sees what the first one answers, and its context before."""
    found = [client_app(MODS, target, **options) for target in targets(NUM)]
    inner = found[0]

    def changed(message, context):
        return change(inner, message, context)

    return [changed if change else inner, *found[1:]]


def run(strategy, own=None, *, rounds=4, **options):
    grid = RoundGrid(InProcessGrid(own or apps()))
    return strategy.start(grid, initial(), num_rounds=rounds, **options), grid


@pytest.mark.parametrize("name", ["round", "train", "refused", "missing-clients", "stand-ins"])
@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_metric_of_a_reserved_name_changes_nothing_else_of_a_round(tmp_path, name, value):
    def change(inner, message, context):
        reply = inner(message, context)
        if message.metadata.message_type == "evaluate":
            reply.content[FEDKIT][f"metrics/{name}"] = value
        return reply

    grid = RoundGrid(InProcessGrid(apps(change=change)))
    recorded = grid.ledger.recording(None, to=tmp_path)
    Plain(min_available_nodes=NUM).start(grid, initial(), num_rounds=3, evaluate_fn=recorded)
    rows = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert all(row.get(name, {}) != value for row in rows[1:])


def test_a_node_that_calls_itself_another_client_in_each_round_counts_once(caplog):
    rounds = iter(range(100))

    def change(inner, message, context):
        context.node_config["client-id"] = f"ghost{next(rounds)}"
        record = context.state.get(FEDKIT, {})
        for name in [name for name in record if name.startswith("aquila")]:
            del record[name]
        return inner(message, context)

    strategy = Aquila(**OPTIONS)
    run(strategy, apps(change=change), rounds=6)
    assert len(strategy.registry.accepted) == NUM
    assert "it was client 'ghost0' before, and now says that it is 'ghost1'" in caplog.text


def test_a_name_is_free_once_its_node_has_gone_or_does_not_answer():
    registry = Registry(lambda report: "")
    registry._meet(1, "a")
    registry.alive = {1, 2}
    for node_id, name, asked in ((2, "a", ()), (1, "b", ())):
        with pytest.raises(ReplyError):
            registry._check_name(node_id, name, asked)
    registry.alive = {2}  # the other one is gone, or owes an answer
    registry._check_name(2, "a")
    with pytest.raises(ReplyError, match="another node is client 'a' already"):
        registry._check_name(2, "a", asked=[1, 2])


@pytest.mark.parametrize("make", [ErrorFeedback, Safari, Aquila])
def test_a_strategy_that_is_started_again_begins_anew(make):
    own = apps()
    grid = InProcessGrid(own)
    strategy = make(**OPTIONS)
    strategy.start(RoundGrid(grid), initial(), num_rounds=4)
    again = strategy.start(RoundGrid(grid), initial(), num_rounds=1)
    fresh = make(**OPTIONS).start(RoundGrid(InProcessGrid(apps())), initial(), num_rounds=1)
    np.testing.assert_array_equal(flatten(to_arrays(again.arrays)), flatten(to_arrays(fresh.arrays)))


def test_two_servers_on_one_checkpoint_are_refused(tmp_path):
    def evaluate(server_round, arrays):
        if server_round == 1:
            with pytest.raises(ConfigError, match="another server is using it"):
                run(Plain(checkpoint=tmp_path, **OPTIONS))

    run(Plain(checkpoint=tmp_path, **OPTIONS), rounds=2, evaluate_fn=evaluate)
    run(Plain(checkpoint=tmp_path, **OPTIONS), rounds=3)


def test_an_aggregation_of_metrics_may_say_nothing():
    options = OPTIONS | {"fraction_evaluate": 1.0}
    quiet = {"train_metrics_aggr_fn": lambda c, k: None, "evaluate_metrics_aggr_fn": lambda c, k: None}
    result, _ = run(Plain(**options, **quiet))
    assert result.arrays
    assert not any(result.evaluate_metrics_clientapp.values())


@pytest.mark.parametrize("size", [1, 3, 14, 64])
def test_error_feedback_at_its_default_rate_sends_models_of_any_size(size):
    target = {"w": np.random.default_rng(1).normal(size=size).astype(np.float32)}
    own = [client_app([ErrorFeedbackMod()], target, rate=0.2)] * NUM
    grid = RoundGrid(InProcessGrid(own))
    begin = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
    result = ErrorFeedback(downlink=None, **OPTIONS).start(grid, begin, num_rounds=60)
    left = to_arrays(result.arrays)["w"] - target["w"]
    assert np.linalg.norm(left) < 0.1 * np.linalg.norm(target["w"])


def test_nodes_that_hold_nothing_known_share_a_parcel(monkeypatch):
    calls, inner = [], Broadcast.parcel_for

    def counted(self, version):
        calls.append(version)
        return inner(self, version)

    monkeypatch.setattr(Broadcast, "parcel_for", counted)
    run(Plain(**OPTIONS), rounds=3)
    assert len(calls) <= 3


def test_what_cannot_mean_anything_is_refused():
    with pytest.raises(ConfigError, match="expected a downlink"):
        Plain(downlink=None, initial=ErrorFeedback().codec)


@pytest.mark.parametrize("columns", [np.r_[0, np.ones(7)], np.linspace(0.01, 1, 8)])
def test_the_scale_is_chosen_on_all_columns_of_a_matrix(columns):
    values = np.random.default_rng(0).normal(size=(4096, 8)).astype(np.float32) * columns.astype(np.float32)
    ((group, levels),) = [ZeroMidTread(4, 4).quantize([values.ravel()], np.random.default_rng(0))]
    error = np.linalg.norm(group.dequantize(levels) - values.ravel()) / np.linalg.norm(values)
    assert error < 0.25


def test_one_client_s_nan_is_left_out_of_the_mean_of_a_metric(caplog):
    def change(inner, message, context):
        reply = inner(message, context)
        reply.content[FEDKIT]["metrics/loss"] = float("nan")
        return reply

    result, _ = run(Plain(**OPTIONS), apps(change=change))
    assert all(metrics["loss"] == 1.0 for metrics in result.train_metrics_clientapp.values())
    assert "'loss' is NaN or infinite in 1 of 4 replies" in caplog.text


@pytest.mark.parametrize("options", [{"quantizer": "sign"}, {"sparsifier": 0.1}, {"row_mask": 2}])
def test_an_option_of_another_type_is_refused_by_the_constructor(options):
    with pytest.raises(ConfigError, match="expected"):
        ErrorFeedback(**options)


def test_the_log_says_how_many_nodes_it_waits_for(caplog):
    caplog.set_level("INFO")
    grid = InProcessGrid(apps())
    with pytest.raises(QuorumError):
        Plain(**(OPTIONS | {"min_available_nodes": NUM + 1}), node_timeout=0.1).start(RoundGrid(grid), initial())
    assert f"{NUM} connected, {NUM} of them ready" in caplog.text
    assert f"Needed: {NUM + 1} connected" in caplog.text
