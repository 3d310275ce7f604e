"""Budgets: never exceeded, and used well."""

import logging

import numpy as np
import pytest
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.clients import AquilaMod, ErrorFeedbackMod
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.wire import Codec
from fedkit.errors import ConfigError
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Aquila, Budget, ErrorFeedback
from tests.helpers.grid import InProcessGrid

EVERYBODY = {"fraction_evaluate": 0.0, "min_train_nodes": 3, "min_available_nodes": 3}
LIKE = {"w": np.zeros((200, 100), np.float32)}
OURS = {"quantizer": EntropyConstrained(2.0), "downlink": Codec(EntropyConstrained(1.0))}


def app(*mods):
    client = ClientApp(mods=list(mods))

    @client.train()
    def train(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        noise = np.random.default_rng(context.node_id).normal(size=(200, 100)).astype(np.float32)
        arrays = from_arrays({"w": to_arrays(record)["w"] + noise})
        return Message(RecordDict({"a": arrays, "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    return client


def run(strategy, mod, rounds=6):
    grid = RoundGrid(InProcessGrid([app(mod)] * 3))
    strategy.start(grid, from_arrays(LIKE), rounds)
    return grid.ledger, [grid.ledger.round_totals(k) for k in range(1, rounds + 1)]


@pytest.mark.parametrize("limit", [30_000, 45_000, 60_000])
def test_a_client_stays_within_its_bytes_and_takes_part_to_the_end(limit):
    ledger, totals = run(ErrorFeedback(budget=Budget(client_bytes=limit), **OURS, **EVERYBODY), ErrorFeedbackMod())
    spent = [ledger.spent(node_id) for node_id in (1000, 1001, 1002)]
    assert 0.6 * limit < max(spent) <= limit
    assert all(t["asked"] == 3 for t in totals)


def test_a_run_stays_within_its_bytes():
    ledger, _ = run(ErrorFeedback(budget=Budget(run_bytes=90_000), **OURS, **EVERYBODY), ErrorFeedbackMod())
    assert 0.6 * 90_000 < ledger.spent() <= 90_000


def test_without_a_limit_that_matters_nothing_changes():
    ledger, _ = run(ErrorFeedback(budget=Budget(client_bytes=10**9), **OURS, **EVERYBODY), ErrorFeedbackMod())
    plain, _ = run(ErrorFeedback(**OURS, **EVERYBODY), ErrorFeedbackMod())
    assert ledger.spent() == plain.spent()


@pytest.mark.parametrize(
    ("make", "mod"),
    [
        (lambda **o: ErrorFeedback(**OURS, **o), ErrorFeedbackMod()),
        (lambda **o: Aquila(beta=0.0, downlink=None, **o), AquilaMod()),
    ],
    ids=["lowest rate", "fixed bits"],
)
def test_who_could_exceed_it_is_not_asked_and_the_log_says_so(make, mod, caplog):
    limit = 180_000 if isinstance(mod, AquilaMod) else 9_000
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        ledger, totals = run(make(budget=Budget(client_bytes=limit), **EVERYBODY), mod)
    assert totals[0]["asked"] == 3
    assert totals[-1]["asked"] == 0
    assert all(ledger.spent(node_id) <= limit for node_id in (1000, 1001, 1002))
    assert "too few for another round" in caplog.text


def test_impossible_limits_are_refused():
    with pytest.raises(ConfigError, match="run_bytes"):
        Budget(run_bytes=0)
