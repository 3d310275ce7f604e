"""What an app may do with Flower's FedAvg, it may do with fedkit: types, options, metrics, configs."""

import logging
from functools import partial

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod, TacMod
from fedkit.codec import Codec, EntropyConstrained
from fedkit.errors import ConfigError
from fedkit.strategies import Aquila, ErrorFeedback, Plain, Safari, Tac
from tests.helpers.grid import InProcessGrid

MODS = [AquilaMod(), ErrorFeedbackMod(), SafariMod(), TacMod()]
MIXED = {
    "half": np.linspace(-1, 1, 12, dtype=np.float16).reshape(3, 4),
    "double": np.linspace(-1, 1, 20),
    "single": np.linspace(-1, 1, 6, dtype=np.float32),
    "scalar": np.asarray(0.5, np.float64),
    "empty": np.zeros((0, 3), np.float32),
    "bn.running_var": np.full(4, 0.01, np.float32),
    "bn.num_batches_tracked": np.asarray(0, np.int64),
    "table": np.arange(5, dtype=np.uint8),
    "flag": np.asarray([True, False]),
}
STRATEGIES = [
    FedAvg,
    Plain,
    ErrorFeedback,
    Aquila,
    lambda **options: Safari(density=0.5, **options),
    lambda **options: Tac(num_clusters=1, **options),
]
IDS = ["fedavg", "plain", "error-feedback", "aquila", "safari", "tac"]


def app(*, record="arrays", weight="num-examples", reverse=False, seen=None, metrics=None):
    """Adds 0.1 to floats, 7 or more to the counter, shrinks the variance; notes what it was given."""
    client = ClientApp(mods=MODS)

    @client.train()
    def train(message: Message, context: Context) -> Message:
        given = {name: array.numpy() for name, array in message.content[record].items()}
        number = int(context.node_config["partition-id"])
        if seen is not None:
            seen.append((given, dict(next(iter(message.content.config_records.values())))))
        local = {name: np.asarray(a + 0.1, a.dtype) if a.dtype.kind == "f" else a for name, a in given.items()}
        local["bn.running_var"] = given["bn.running_var"] * np.float32(0.1)
        local["bn.num_batches_tracked"] = np.asarray(given["bn.num_batches_tracked"] + 7 + number)
        names = reversed(local) if reverse else local
        own = {
            weight: 10 * (1 + number),
            "loss": float(number),
            "per-class": [1.0, float(number)],
            **(metrics or {}),
        }
        arrays = ArrayRecord({name: Array(local[name]) for name in names})
        return Message(RecordDict({record: arrays, "metrics": MetricRecord(own)}), reply_to=message)

    @client.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        return Message(
            RecordDict({"m": MetricRecord({weight: 1 + number, "acc": 0.5 * number})}), reply_to=message
        )

    return client


def initial():
    return ArrayRecord({name: Array(array) for name, array in MIXED.items()})


def started(make, *, rounds=2, nodes=3, start=None, **of_app):
    return make().start(InProcessGrid([app(**of_app)] * nodes), initial(), num_rounds=rounds, **(start or {}))


@pytest.mark.parametrize("make", STRATEGIES[1:], ids=IDS[1:])
def test_the_app_gets_its_own_names_shapes_and_types_and_so_does_the_result(make):
    seen = []
    result = started(make, seen=seen)
    for given, _ in seen:
        assert {n: (a.dtype, a.shape) for n, a in given.items()} == {
            n: (a.dtype, a.shape) for n, a in MIXED.items()
        }
    final = {name.removeprefix("cluster-0/"): array.numpy() for name, array in result.arrays.items()}
    assert {n: (a.dtype, a.shape) for n, a in final.items()} == {n: (a.dtype, a.shape) for n, a in MIXED.items()}
    np.testing.assert_array_equal(final["table"], MIXED["table"])
    np.testing.assert_array_equal(final["flag"], MIXED["flag"])


@pytest.mark.parametrize("make", STRATEGIES[:5], ids=IDS[:5])
def test_integers_and_statistics_are_averaged_without_loss(make):
    final = started(make, rounds=2).arrays
    counter = (7 * 10 + 8 * 20 + 9 * 30) / 60  # weighted by examples, in each round
    assert final["bn.num_batches_tracked"].numpy() == pytest.approx(2 * counter, abs=1.0)
    np.testing.assert_allclose(final["bn.running_var"].numpy(), 0.01**2 * np.ones(4), rtol=1e-5)


def test_a_counter_has_no_say_in_who_is_silent():
    silent = Aquila(fraction_evaluate=0.0)
    started(lambda: silent, rounds=4)
    moved = silent.border.ordinary.beside["bn.num_batches_tracked"]
    assert moved > 25
    assert not {"bn.num_batches_tracked", "bn.running_var"} & set(silent._params)  # what the skip rule compares


def test_double_precision_goes_through_as_float32():
    final = started(lambda: Plain(downlink=None, fraction_evaluate=0.0)).arrays
    np.testing.assert_allclose(final["double"].numpy(), MIXED["double"] + 0.2, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(final["half"].numpy(), MIXED["half"] + 0.2, atol=2e-3)


def test_an_app_may_return_its_arrays_in_another_order():
    final = started(lambda: Plain(downlink=None, fraction_evaluate=0.0), reverse=True).arrays
    assert list(final) == list(MIXED)


def test_arrays_that_are_no_numbers_are_refused_with_their_name():
    record = ArrayRecord({"w": Array(np.zeros(3, np.complex64))})
    with pytest.raises(ConfigError, match=r"'w': expected real numbers, got complex64"):
        Plain().start(InProcessGrid([app()] * 2), record, num_rounds=1)


@pytest.mark.parametrize("make", STRATEGIES, ids=IDS)
def test_every_option_of_fedavg_is_honoured(make):
    seen, called = [], []

    def metrics(contents, key):
        called.append(
            (len(contents), key, sorted(r["metrics" if "metrics" in r else "m"]["weight"] for r in contents))
        )
        return MetricRecord({"mine": 1.0})

    result = started(
        lambda: make(
            fraction_train=0.5,
            fraction_evaluate=0.25,
            min_train_nodes=3,
            min_evaluate_nodes=1,
            min_available_nodes=5,
            weighted_by_key="weight",
            arrayrecord_key="weights",
            configrecord_key="settings",
            train_metrics_aggr_fn=metrics,
            evaluate_metrics_aggr_fn=metrics,
        ),
        nodes=5, record="weights", weight="weight", seen=seen, rounds=1,
        start={"train_config": ConfigRecord({"lr": 0.5})},
    )  # fmt: skip
    assert len(seen) == 3  # 0.5 of 5, but at least 3
    assert all(config["lr"] == 0.5 and config["server-round"] == 1 for _, config in seen)
    assert [(number, key) for number, key, _ in called] == [(3, "weight"), (1, "weight")]
    assert dict(result.train_metrics_clientapp[1]).get("mine") == 1.0
    assert dict(result.evaluate_metrics_clientapp[1]) == {"mine": 1.0}


@pytest.mark.parametrize("make", STRATEGIES[:5], ids=IDS[:5])
def test_metrics_are_averaged_as_flower_does_lists_too(make):
    result = started(make, rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx((0 * 10 + 1 * 20 + 2 * 30) / 60)
    assert metrics["per-class"] == pytest.approx([1.0, 80 / 60])
    assert result.evaluate_metrics_clientapp[1]["acc"] == pytest.approx((0 * 1 + 0.5 * 2 + 1.0 * 3) / 6)


def test_an_app_that_does_not_say_its_weight_is_told_so(caplog):
    with caplog.at_level(logging.WARNING):
        started(lambda: Plain(fraction_evaluate=0.0), weight="examples", rounds=1)
    assert "it lacks the metric 'num-examples'" in caplog.text


def test_a_weight_that_no_sum_could_hold_costs_that_reply_alone(caplog):
    apps = [app(), app(metrics={"num-examples": 1e308}), app()]
    with caplog.at_level(logging.WARNING):
        result = Plain(fraction_evaluate=0.0).start(InProcessGrid(apps), initial(), num_rounds=2)
    assert "must be above 0, at most 1e+15, got 1e+308" in caplog.text
    assert all(np.isfinite(array.numpy()).all() for array in result.arrays.values())


def test_who_evaluates_is_another_choice_than_who_trained():
    asked = {"train": [], "evaluate": []}

    class Watched(InProcessGrid):
        def answer(self, message):
            asked[message.metadata.message_type].append(message.metadata.dst_node_id)
            return super().answer(message)

    strategy = Plain(fraction_train=0.2, fraction_evaluate=0.2)
    strategy.start(Watched([app()] * 20), initial(), num_rounds=5)
    trained, evaluated = (np.reshape(nodes[-20:], (5, 4)) for nodes in asked.values())
    assert any(set(a) != set(b) for a, b in zip(trained, evaluated, strict=True))


@pytest.mark.parametrize("base", [FedAvg, Plain, ErrorFeedback, Aquila, Safari])
def test_a_subclass_may_set_the_learning_rate_in_each_round(base):
    class Halving(base):
        def configure_train(self, server_round, arrays, config, grid):
            config["lr"] = 0.5**server_round
            return super().configure_train(server_round, arrays, config, grid)

        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            metrics["rounds"] = server_round
            return arrays, metrics

    seen = []
    result = started(lambda: Halving(fraction_evaluate=0.0), seen=seen, rounds=2)
    assert [config["lr"] for _, config in seen] == [0.5] * 3 + [0.25] * 3
    assert result.train_metrics_clientapp[2]["rounds"] == 2


def test_a_coded_downlink_keeps_types_and_a_resumed_run_what_goes_beside(tmp_path):
    def make():
        return Plain(downlink=Codec(EntropyConstrained(4.0)), checkpoint=tmp_path, fraction_evaluate=0.0)

    started(make, rounds=1)
    resumed = started(make, rounds=2).arrays
    whole = started(lambda: Plain(downlink=Codec(EntropyConstrained(4.0)), fraction_evaluate=0.0), rounds=2).arrays
    for name in MIXED:
        np.testing.assert_array_equal(resumed[name].numpy(), whole[name].numpy(), err_msg=name)
        assert resumed[name].dtype == whole[name].dtype


@pytest.mark.parametrize(
    "make",
    [
        Plain,
        Aquila,
        Safari,
        Safari.published,
        partial(Tac, num_clusters=2),
        partial(Tac, num_clusters=2, density=0.5),
    ],
)
def test_a_parameter_without_dimensions_is_trained_and_saved(make, tmp_path):
    client = ClientApp(mods=MODS)

    @client.train()
    def train(message, context):
        (record,) = message.content.array_records.values()
        moved = {name: array.numpy() + np.float32(1) for name, array in record.items()}
        arrays = ArrayRecord({name: Array(np.asarray(array)) for name, array in moved.items()})
        return Message(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    start = ArrayRecord(
        {"logit_scale": Array(np.asarray(2.5, np.float32)), "w": Array(np.ones((3, 4), np.float32))}
    )
    for rounds in (2, 3):
        strategy = make(fraction_evaluate=0.0, checkpoint=tmp_path)
        result = strategy.start(InProcessGrid([client] * 3), start, num_rounds=rounds)
    found = {name.removeprefix("cluster-0/"): array.numpy() for name, array in result.arrays.items()}
    assert found["logit_scale"].shape == ()
    assert found["logit_scale"] > 2.5


@pytest.mark.parametrize(
    ("make", "wrong", "near"), [(Aquila, "fraction_evalute", "fraction_evaluate"), (Safari, "densty", "density")]
)
def test_a_misspelt_option_is_refused_with_the_nearest_one(make, wrong, near):
    with pytest.raises(TypeError, match=f"option of {make.__name__} '{wrong}'. Did you mean '{near}'"):
        make(**{wrong: 0.1})
