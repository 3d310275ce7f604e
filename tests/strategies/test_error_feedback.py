"""Error feedback and the coded downlink, through real Flower objects."""

import numpy as np
import pytest
from flwr.app import MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod
from fedkit.codec.baselines import Sign
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.rotation import Eden
from fedkit.codec.sparsify import Structured, TopK
from fedkit.codec.wire import Codec
from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.message import to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Aquila, ErrorFeedback, Safari, Tac
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import client_app, initial, optimum, targets

EVERYBODY = {"fraction_evaluate": 0.0, "min_train_nodes": 4, "min_available_nodes": 4}
OURS = EntropyConstrained(2.0)


def clients(mod, num=4, **options):
    return [client_app([mod], target, **options) for target in targets(num)]


def run(strategy, apps, rounds=10, faults=None, **kwargs):
    grid = RoundGrid(InProcessGrid(apps), faults=faults)
    result = strategy.start(grid, initial(), num_rounds=rounds, **kwargs)
    return flat(to_arrays(result.arrays)), grid, result


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays.values()])


def distance(params):
    return float(np.linalg.norm(params - optimum(4)) / np.linalg.norm(optimum(4)))


def test_without_loss_it_is_fedavg():
    apps = [
        client_app([ErrorFeedbackMod()], t, num_examples=n) for n, t in zip((1, 5, 9, 20), targets(4), strict=True)
    ]
    ours, *_ = run(ErrorFeedback(quantizer=ZeroMidTread(16, 16), downlink=Codec(), **EVERYBODY), apps)
    theirs, *_ = run(FedAvg(**EVERYBODY), apps)
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "drop"),
    [
        ({"quantizer": Sign()}, 0.0),
        ({"quantizer": Eden(1)}, 0.0),
        ({"quantizer": OURS}, 0.0),
        ({"quantizer": OURS}, 0.3),
        ({"quantizer": ZeroMidTread(), "sparsifier": TopK(0.2)}, 0.0),
        ({"quantizer": ZeroMidTread(), "sparsifier": Structured(0.5)}, 0.3),
        ({"quantizer": None, "sparsifier": TopK(0.2)}, 0.3),
    ],
    ids=repr,
)
def test_what_is_lost_is_sent_later_so_the_optimum_is_reached(options, drop):
    strategy = ErrorFeedback(downlink=Codec(OURS), **options, **EVERYBODY)
    params, *_ = run(strategy, clients(ErrorFeedbackMod(), rate=0.1), 60, Faults(drop=drop))
    assert distance(params) < (0.4 if drop else 0.2)


def test_without_memory_signs_do_not_reach_it():
    """The same signs, each round for themselves: what the memory is for."""
    with_memory, *_ = run(ErrorFeedback(quantizer=Sign(), **EVERYBODY), clients(ErrorFeedbackMod(), rate=0.1), 60)

    class Forgetful(ErrorFeedbackMod):
        def code(self, update, job):
            job.state.clear()
            return super().code(update, job)

    without, *_ = run(ErrorFeedback(quantizer=Sign(), **EVERYBODY), clients(Forgetful(), rate=0.1), 60)
    assert distance(with_memory) < 0.5 * distance(without)


@pytest.mark.parametrize(
    ("strategy", "mod"),
    [(Aquila, AquilaMod), (ErrorFeedback, ErrorFeedbackMod), (Safari, SafariMod)],
    ids=["aquila", "error-feedback", "safari"],
)
@pytest.mark.parametrize("drop", [0.0, 0.4])
def test_every_client_gets_the_arrays_that_the_server_reports(strategy, mod, drop):
    """`evaluate_fn` sees, bit for bit, what each client is given next, whatever replies were lost before."""
    reported, given = {}, []

    def evaluate_fn(server_round, arrays):
        reported[server_round] = flat(to_arrays(arrays))
        return MetricRecord()

    def spy(message, context, call_next):
        (record,) = message.content.array_records.values()
        given.append((message.content["config"]["server-round"], flat(to_arrays(record))))
        return call_next(message, context)

    apps = [client_app([mod(), spy], target) for target in targets(4)]
    _, grid, result = run(
        strategy(downlink=Codec(OURS), **EVERYBODY), apps, 8, Faults(drop=drop), evaluate_fn=evaluate_fn
    )
    assert len(given) == 32
    assert all(np.array_equal(arrays, reported[server_round - 1]) for server_round, arrays in given)
    assert np.array_equal(flat(to_arrays(result.arrays)), reported[8])
    assert grid.ledger.round_totals(8)["rejected"] == 0


def test_evaluation_messages_are_coded_too_and_count():
    strategy = ErrorFeedback(
        quantizer=OURS,
        downlink=Codec(OURS),
        min_train_nodes=2,
        min_evaluate_nodes=4,
        min_available_nodes=4,
        fraction_train=0.5,
    )
    _, grid, result = run(strategy, clients(ErrorFeedbackMod()), 6)
    losses = [m["eval-loss"] for m in result.evaluate_metrics_clientapp.values()]
    assert losses[-1] < 0.9 * losses[0]
    entries = [e for e in grid.ledger.entries[6] if e.direction == "downlink"]
    assert len(entries) == 6, "two were trained, four evaluated"


def test_a_client_that_lost_its_state_is_brought_back(caplog):
    apps = clients(ErrorFeedbackMod())
    inner = InProcessGrid(apps)
    strategy = ErrorFeedback(quantizer=OURS, downlink=Codec(OURS), **EVERYBODY)

    def lose(server_round, arrays):
        if server_round == 3:
            next(iter(inner.contexts.values())).state = RecordDict()
        return MetricRecord()

    grid = RoundGrid(inner)
    strategy.start(grid, initial(), num_rounds=6, evaluate_fn=lose)
    assert [grid.ledger.round_totals(k)["rejected"] for k in range(1, 7)] == [0, 0, 0, 1, 0, 0]
    assert "does not hold the version" in caplog.text


def test_a_coded_downlink_takes_fewer_bytes():
    dense, one, _ = run(ErrorFeedback(quantizer=OURS, downlink=None, **EVERYBODY), clients(ErrorFeedbackMod()), 10)
    coded, other, _ = run(
        ErrorFeedback(quantizer=OURS, downlink=Codec(OURS), **EVERYBODY), clients(ErrorFeedbackMod()), 10
    )
    down = [grid.ledger.round_totals(9)["downlink-bytes"] for grid in (one, other)]
    assert down[1] < down[0] - 4 * 250, "88 values in float32 take 352 bytes"
    assert distance(coded) < distance(dense) + 0.05


def test_tac_refuses_a_coded_downlink_with_the_reason():
    with pytest.raises(ConfigError, match="each node other arrays"):
        Tac(num_clusters=2, downlink=Codec())
