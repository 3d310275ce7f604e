"""Apps written as Flower's templates are work with fedkit by a change of two lines."""

import importlib
from functools import cache

import pytest
from flwr.app import ArrayRecord, Context, RecordDict

from fedkit.clients import TacMod
from fedkit.flower import deflate, task_identity
from tests.helpers.grid import InProcessGrid

ROUNDS = {"pytorch": 8, "numpy": 8, "peft": 10}
CASES = [("numpy", strategy) for strategy in ("error-feedback", "aquila", "safari", "tac")]
CASES += [  # torch takes long
    pytest.param(name, strategy, marks=marks)
    for name in ("pytorch", "peft")
    for strategy, marks in {
        "error-feedback": [pytest.mark.slow],
        "aquila": [pytest.mark.slow],
        "safari": [pytest.mark.slow, pytest.mark.full],
        "tac": [pytest.mark.slow, pytest.mark.full],
    }.items()
]


class CountingGrid(InProcessGrid):
    """Counts the bytes of all replies, and keeps what the app itself saw and said."""

    uplink = 0

    def pull_messages(self, message_ids):
        replies = super().pull_messages(message_ids)
        for reply in replies:
            assert not reply.has_error(), reply.error.reason
            self.uplink += sum(map(len, deflate(reply)[1].values()))
        return replies


def schema(record):
    return [(name, array.dtype, tuple(array.shape)) for name, array in record.items()]


def initial(app_name):
    """The arrays that the app's server begins with."""
    app = importlib.import_module(f"tests.fixtures.stock_apps.{app_name}_app")
    return app.initial_arrays()


def run(app_name, strategy):
    """Return the final accuracy, the bytes of all replies, and the final arrays."""
    app = importlib.import_module(f"tests.fixtures.stock_apps.{app_name}_app")
    config = {"strategy": strategy, "num-server-rounds": ROUNDS[app_name], "lr": 0.05, "local-epochs": 2}
    grid = CountingGrid([app.app] * 4)
    for context in grid.contexts.values():
        context.run_config = config
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=config)
    with task_identity(run_id=1, node_id=1):
        app.server(grid, context)
    final = context.state["final"]
    return app.global_evaluate(0, final)["accuracy"], grid.uplink, final


@cache
def with_fedavg(app_name):
    """The same app with Flower's FedAvg: what it should learn, and send at most."""
    return run(app_name, "fedavg")


@pytest.mark.slow
def test_bfloat16_is_refused_by_flower_itself():
    torch = pytest.importorskip("torch")
    with pytest.raises(TypeError, match="BFloat16"):
        ArrayRecord({"w": torch.zeros(2, dtype=torch.bfloat16)})


@pytest.fixture
def seen(monkeypatch):
    """What the app itself is given: the last of its mods notes it."""
    found = []
    inner = TacMod.__call__

    def call(self, message, context, call_next):
        def watched(message, context):
            (record,) = message.content.array_records.values()
            found.append(schema(record))
            return call_next(message, context)

        return inner(self, message, context, watched)

    monkeypatch.setattr(TacMod, "__call__", call)
    return found


@pytest.mark.parametrize(("app_name", "strategy"), CASES)
def test_a_stock_app_learns_sees_its_own_arrays_and_sends_less(app_name, strategy, seen):
    accuracy, uplink, _ = with_fedavg(app_name)
    seen.clear()
    found, sent, arrays = run(app_name, strategy)
    own = schema(initial(app_name))
    assert seen
    assert all(given == own for given in seen)
    assert [(n.removeprefix("cluster-0/"), *rest) for n, *rest in schema(arrays)] == own
    # half a bit, or a fifth of the entries, of 800 values for 10 rounds
    lag = {"error-feedback": 0.3, "safari": 0.1}.get(strategy, 0.05) if app_name == "peft" else 0.05
    assert found > accuracy - lag
    assert sent < {"tac": 1.0, "safari": 0.6}.get(strategy, 0.35) * uplink
