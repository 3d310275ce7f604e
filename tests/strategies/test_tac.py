"""TAC against plain FedAvg and against an obvious twin; who is sent what; bad replies; quantized slots."""

import logging

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedkit.aggregation.identities import cluster_accuracy, clusters_of_tasks
from fedkit.aggregation.slots import join_clusters, split_clusters
from fedkit.clients import TacMod
from fedkit.clients.tac import join_slots, split_slots
from fedkit.codec.quantize import ZeroMidTread
from fedkit.errors import ConfigError, SchemaMismatchError
from fedkit.faults import Faults
from fedkit.flower import GridWrapper
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Tac
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, client_app, initial, targets

TASKS = {"0": (0, 1), "1": (2,), "2": (1, 0, 2), "3": (0, 2), "4": (1,), "5": (2, 1)}
RATE = 0.3


def goals(client, task):
    """The target of a task, and a little of the client's own."""
    shared, own = targets(3)[task], targets(70, seed=1)[10 * client + task]
    return {name: shared[name] + np.float32(0.1) * own[name] for name in LIKE}


def client(wanted, *, mods=None, num_examples=10, tamper=lambda slots: slots):
    """A client that moves each of its slots towards its target."""
    app = ClientApp(mods=[TacMod()] if mods is None else mods)

    @app.train()
    def train(message, context):
        (record,) = message.content.array_records.values()
        received = split_slots(to_arrays(record), len(wanted))
        local = [
            {n: a + np.float32(RATE) * (goal[n] - a) for n, a in each.items()}
            for each, goal in zip(received, wanted, strict=True)
        ]
        arrays = from_arrays(join_slots(tamper(local)))
        return Message(
            RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": num_examples})}),
            reply_to=message,
        )

    @app.evaluate()
    def evaluate(message, context):
        (record,) = message.content.array_records.values()
        received = split_slots(to_arrays(record), len(wanted))
        loss = sum(
            float(np.square(a - goal[n]).sum())
            for each, goal in zip(received, wanted, strict=True)
            for n, a in each.items()
        )
        return Message(
            RecordDict({"metrics": MetricRecord({"num-examples": num_examples, "eval-loss": loss})}),
            reply_to=message,
        )

    return app


def clients(**options):
    return [client([goals(int(name), task) for task in tasks], **options) for name, tasks in TASKS.items()]


def everybody(num=6):
    return {"fraction_evaluate": 0.0, "min_train_nodes": num, "min_available_nodes": num}


def run(strategy, apps, rounds=6, start=None, spy=None, faults=None):
    grid = InProcessGrid(apps)
    grid = RoundGrid(spy(grid) if spy else grid, faults=faults)
    result = strategy.start(grid, start or initial(), num_rounds=rounds)
    return to_arrays(result.arrays), grid


def by_task(params, strategy):
    clusters, found = split_clusters(params), clusters_of_tasks(strategy.state.assignment, TASKS)
    return [clusters[found[task]] for task in range(3)]


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays.values()])


def test_agrees_with_an_obvious_twin():
    """The paper's loop for clusters that are found: per task, the mean of what its clients have."""
    strategy = Tac(num_clusters=3, **everybody())
    params, _ = run(strategy, clients(), rounds=8)
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    for task, found in enumerate(by_task(params, strategy)):
        theta = np.zeros(88, np.float32)
        holders = [int(name) for name, tasks in TASKS.items() if task in tasks]
        for _ in range(8):
            theta = np.mean([theta + np.float32(RATE) * (flat(goals(i, task)) - theta) for i in holders], axis=0)
        np.testing.assert_allclose(flat(found), theta, atol=1e-5)


@pytest.mark.parametrize(("weighted", "examples"), [(False, (10,) * 4), (True, (1, 5, 9, 20))])
def test_one_cluster_and_one_slot_is_fedavg(weighted, examples):
    apps = [client([goals(i, 0)], num_examples=n) for i, n in enumerate(examples)]
    ours, _ = run(Tac(num_clusters=1, weighted=weighted, **everybody(4)), apps)
    theirs, _ = run(FedAvg(**everybody(4)), apps, start=from_arrays(join_slots([LIKE])))
    np.testing.assert_allclose(flat(ours), flat(theirs), atol=1e-6)


def test_permuting_clients_changes_nothing():
    apps = [client([goals(i, 0), goals(i, 1)]) for i in range(4)]
    one, _ = run(Tac(num_clusters=2, **everybody(4)), apps)
    other, _ = run(Tac(num_clusters=2, **everybody(4)), apps[::-1])
    found = min(
        np.abs(flat(one) - flat(join_clusters(order))).max()
        for order in (split_clusters(other), split_clusters(other)[::-1])
    )
    assert found < 1e-6


def test_arrival_order_changes_nothing():
    class Late(GridWrapper):
        def pull_messages(self, message_ids):
            return list(self.inner.pull_messages(message_ids))[::-1]

    one, _ = run(Tac(num_clusters=3, **everybody()), clients())
    other, _ = run(Tac(num_clusters=3, **everybody()), clients(), spy=Late)
    np.testing.assert_array_equal(flat(one), flat(other))


def test_clusters_keep_their_numbers_from_round_to_round():
    seen, strategy = [], Tac(num_clusters=3, **everybody())
    grid = InProcessGrid(clients())
    strategy.start(
        grid, initial(), num_rounds=5, evaluate_fn=lambda k, arrays: seen.append(strategy.state.assignment)
    )
    assert seen[0] == {}
    assert all(assignment == seen[1] for assignment in seen[1:])


def test_evaluation_sees_an_adapter_per_cluster_from_the_start():
    seen = []
    strategy = Tac(num_clusters=2, **everybody())
    strategy.start(
        InProcessGrid(clients()), initial(), num_rounds=1, evaluate_fn=lambda k, arrays: seen.append(list(arrays))
    )
    names = [f"cluster-{k}/{name}" for k in range(2) for name in LIKE]
    assert seen == [names, names]


def test_a_run_can_start_from_the_clusters_of_another():
    strategy = Tac(num_clusters=3, **everybody())
    params, _ = run(strategy, clients())
    further, _ = run(Tac(num_clusters=3, **everybody()), clients(), rounds=1, start=from_arrays(params))
    assert list(further) == list(params)
    with pytest.raises(SchemaMismatchError, match="expected 2 clusters, got 3"):
        run(Tac(num_clusters=2, **everybody()), clients(), start=from_arrays(params))


def test_a_client_that_missed_rounds_gets_its_clusters_as_they_are_now():
    strategy = Tac(num_clusters=3, **everybody())
    params, _ = run(strategy, clients(), faults=Faults(rates={"2": 1.0}, start_round=2))
    sent = strategy.distribute(params, [1002])[1002]
    expected = [by_task(params, strategy)[task] for task in TASKS["2"]]
    np.testing.assert_array_equal(flat(sent), flat(join_slots(expected)))


def test_a_client_that_comes_late_starts_from_the_first_adapter():
    strategy = Tac(num_clusters=3, **everybody())
    params, _ = run(strategy, clients())
    sent = strategy.distribute(params, [77, 78])
    assert sent[77] is sent[78]
    assert list(sent[77]) == [f"slot-0/{name}" for name in LIKE]
    np.testing.assert_array_equal(flat(sent[77]), flat(LIKE))


def test_clients_evaluate_the_adapters_of_their_own_slots():
    strategy = Tac(num_clusters=3, min_train_nodes=6, min_evaluate_nodes=6, min_available_nodes=6)
    result = strategy.start(InProcessGrid(clients()), initial(), num_rounds=8)
    losses = [m["eval-loss"] for m in result.evaluate_metrics_clientapp.values()]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1 * losses[0]


def test_quantized_slots_stay_near_the_exact_ones_and_are_much_smaller():
    exact_strategy, strategy = (
        Tac(num_clusters=3, quantizer=q, **everybody()) for q in (None, ZeroMidTread(8, 8))
    )
    exact, exact_grid = run(exact_strategy, clients())
    coded, grid = run(strategy, clients())
    np.testing.assert_allclose(flat(coded), flat(exact), atol=0.05)
    assert strategy.state.assignment == exact_strategy.state.assignment
    assert not np.array_equal(flat(coded), flat(exact))

    def uplink(ledger):
        return sum(ledger.round_totals(k)["uplink-bytes"] for k in range(1, 7))

    assert uplink(exact_grid.ledger) - uplink(grid.ledger) > 6 * 0.7 * 4 * 11 * 88  # 11 slots of 88 values


def hostile(value):
    def mod(message, context, call_next):
        reply = call_next(message, context)
        if value is None:
            del reply.content["fedkit"]["fedkit-option-num-slots"]
        else:
            reply.content["fedkit"]["fedkit-option-num-slots"] = value
        return reply

    return mod


@pytest.mark.parametrize("value", [10**9, 4, 0, -1, True, 1.0, "1", None])
def test_an_absurd_number_of_slots_is_refused_and_the_round_goes_on(value, caplog):
    good = clients()
    bad = client([goals(6, 0)], mods=[hostile(value), TacMod()])
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, grid = run(Tac(num_clusters=3, **everybody(7)), [*good, bad], rounds=2)
    alone, _ = run(Tac(num_clusters=3, **everybody()), good, rounds=2)
    np.testing.assert_array_equal(flat(params), flat(alone))
    assert grid.ledger.round_totals(1)["rejected"] == 1
    assert "num-slots: expected 1 to 3" in caplog.text
    assert "node 1006" in caplog.text


def test_another_number_of_slots_than_the_frame_has_is_refused(caplog):
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        _, grid = run(
            Tac(num_clusters=3, **everybody(7)), [*clients(), client([goals(6, 0)], mods=[hostile(2), TacMod()])]
        )
    assert grid.ledger.round_totals(1)["rejected"] == 1
    assert "other names or shapes" in caplog.text


def _nan(slots):
    return [slots[0] | {"lora_B": np.full((10, 4), np.nan, np.float32)}]


def _other_rank(slots):
    return [{"lora_A": np.zeros((8, 12), np.float32), "lora_B": np.zeros((10, 8), np.float32)}]


@pytest.mark.parametrize(
    ("tamper", "reason"), [(_nan, "NaN"), (_other_rank, "expected shape (4, 12), got (8, 12)")]
)
def test_bad_adapters_are_refused_upstream(tamper, reason, caplog):
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, grid = run(Tac(num_clusters=3, **everybody(7)), [*clients(), client([goals(6, 0)], tamper=tamper)])
    assert np.isfinite(flat(params)).all()
    assert grid.ledger.round_totals(1)["rejected"] == 1
    assert reason in caplog.text


def test_an_app_with_one_task_need_not_know_of_slots():
    apps = [client_app([TacMod()], target) for target in targets(3)]
    ours = run(Tac(num_clusters=1, **everybody(3)), apps)[0]
    theirs = run(FedAvg(**everybody(3)), apps)[0]
    np.testing.assert_allclose(flat(ours), flat(theirs), atol=1e-6)


def test_a_client_may_get_more_tasks():
    apps = clients()
    strategy = Tac(num_clusters=3, **everybody())
    grid = InProcessGrid(apps)

    def grow(server_round, arrays):
        if server_round == 3:
            grid.apps[1001] = client([goals(1, 2), goals(1, 0)])

    strategy.start(grid, initial(), num_rounds=6, evaluate_fn=grow)
    assert len(strategy.state.assignment["1"]) == 2
    assert cluster_accuracy(strategy.state.assignment, {**TASKS, "1": (2, 0)}) == 1.0


def test_impossible_options_are_refused_at_construction():
    with pytest.raises(ConfigError, match="num_clusters"):
        Tac(num_clusters=0)
    with pytest.raises(ConfigError, match="max_slots"):
        Tac(num_clusters=2, max_slots=0)
