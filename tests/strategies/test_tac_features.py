"""Slots told apart by features: from the first round; said once; by default only where they form clusters."""

import logging

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.aggregation.evidence import FEATURES, MOST, WIDTH, compared, features_from_text, features_to_text
from fedkit.aggregation.identities import cluster_accuracy
from fedkit.aggregation.tasks import Tasks
from fedkit.arrays import num_values
from fedkit.clients import TacMod
from fedkit.clients.tac import join_slots, split_slots
from fedkit.errors import ConfigError, ReplyError
from fedkit.message import from_arrays, read_instructions, to_arrays
from fedkit.rehearsal import stand_in
from fedkit.report import read_rounds
from fedkit.rounds import RoundGrid
from fedkit.strategies import Tac
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import initial

TASKS = {"0": (0, 1), "1": (2,), "2": (1, 0, 2), "3": (0, 2), "4": (1,), "5": (2, 1)}
MEANS = np.random.default_rng(0).normal(size=(3, 24)).astype(np.float32)


def client(name, asked, *, says=None):
    """A client whose updates are noise; what its examples are like is its tasks' and a little its own."""
    app = ClientApp(mods=[TacMod()])

    @app.train()
    def train(message, context):
        wanted = TASKS[name]
        asked.append((name, bool(read_instructions(message).options.get(FEATURES))))
        rng = np.random.default_rng([int(name), read_instructions(message).server_round])
        (record,) = message.content.array_records.values()
        received = split_slots(to_arrays(record), len(wanted))
        local = [
            {n: a + rng.normal(size=a.shape).astype(np.float32) for n, a in each.items()} for each in received
        ]
        own = MEANS[list(wanted)] + rng.normal(size=(len(wanted), MEANS.shape[1])) / 4
        content = RecordDict(
            {"arrays": from_arrays(join_slots(local)), "metrics": MetricRecord({"num-examples": 1})}
        )
        text = features_to_text(own.astype(np.float32)) if says is None else says
        if text:
            content[FEATURES] = ConfigRecord({"means": text})
        return Message(content, reply_to=message)

    return app


def run(strategy, apps, rounds=3):
    return strategy.start(RoundGrid(InProcessGrid(apps)), initial(), num_rounds=rounds)


def tac(**options):
    settings = {"fraction_evaluate": 0.0, "min_train_nodes": 5, "min_available_nodes": 6, "evidence": "features"}
    return Tac(num_clusters=3, **(settings | options))


def test_noise_is_clustered_by_what_examples_are_like_and_asked_for_once():
    asked, strategy = [], tac()
    run(strategy, [client(name, asked) for name in TASKS])
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    assert sorted(name for name, wanted in asked if wanted) == sorted(TASKS), "in the first round, and never again"
    assert len(asked) == 3 * len(TASKS)
    by_adapters, asked = tac(evidence="adapters"), []
    run(by_adapters, [client(name, asked) for name in TASKS])
    assert cluster_accuracy(by_adapters.state.assignment, TASKS) < 1.0
    assert not any(wanted for _, wanted in asked)


def test_by_default_features_count_where_they_form_clusters():
    asked, strategy = [], tac(evidence="auto")
    run(strategy, [client(name, asked) for name in TASKS])
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    assert sorted(name for name, wanted in asked if wanted) == sorted(TASKS)


@pytest.mark.parametrize("silent", [list(TASKS), ["2"], []], ids=["nobody has any", "one has none", "noise"])
def test_by_default_adapters_count_where_features_do_not(silent):
    """To the bit: as if nobody had been asked."""
    rng = np.random.default_rng(1)
    noise = {name: rng.normal(size=(len(tasks), 24)).astype(np.float32) for name, tasks in TASKS.items()}
    says = {name: "" if name in silent else None if silent else features_to_text(noise[name]) for name in TASKS}
    ends = []
    for evidence in ("auto", "adapters"):
        strategy = tac(evidence=evidence, min_train_nodes=6)
        end = run(strategy, [client(name, [], says=says[name]) for name in TASKS])
        ends.append((strategy.state.assignment, to_arrays(end.arrays)))
    assert ends[0][0] == ends[1][0]
    for name, array in ends[0][1].items():
        np.testing.assert_array_equal(array, ends[1][1][name])


def test_features_of_clients_whose_examples_differ_more_than_tasks_do_are_not_apart():
    rng, owners = np.random.default_rng(0), [str(i) for i in range(12) for _ in range(3)]
    means = np.repeat(rng.normal(size=(12, 24)), 3, axis=0) + rng.normal(size=(36, 24)) / 4
    rows = {
        f"{owner}#{i % 3}": (1, widened(row)) for i, (owner, row) in enumerate(zip(owners, means, strict=True))
    }
    points, former = compared(rows, {}, 3)
    labels = Tasks(3, evidence="features").label(owners, points, former)
    assert not Tasks(3).apart(owners, points, labels)
    assert Tasks(3, evidence="features").apart(owners, points, labels), "who asks for features gets them"


def test_features_that_are_far_off_move_no_other_slot():
    asked, strategy = [], tac(evidence="auto", min_train_nodes=6)
    far = features_to_text(np.full((2, 24), 6e4, np.float32))
    run(strategy, [client(name, asked, says=far if name == "0" else None) for name in TASKS])
    others = {name: tasks for name, tasks in TASKS.items() if name != "0"}
    assert cluster_accuracy({name: strategy.state.assignment[name] for name in others}, others) == 1.0


def widened(row):
    """A slot's row as the server keeps it."""
    return np.stack([np.pad(row, (0, WIDTH - len(row))), np.zeros(WIDTH)]).astype(np.float32)


def test_a_rehearsal_of_such_a_server_has_features_too():
    strategy = tac(min_train_nodes=6)
    run(strategy, [stand_in(ClientApp(mods=[TacMod()]))] * 6, rounds=2)
    assert len(strategy.state.assignment) == len(strategy.state.evidence) == 6


def test_a_resumed_run_does_not_ask_again(tmp_path):
    asked, apps = [], []
    apps = [client(name, asked) for name in TASKS]
    run(tac(checkpoint=tmp_path), apps, rounds=2)
    before, resumed = len(asked), tac(checkpoint=tmp_path)
    run(resumed, apps, rounds=4)
    assert cluster_accuracy(resumed.state.assignment, TASKS) == 1.0
    assert [wanted for _, wanted in asked[before:]] == [False] * 12


@pytest.mark.parametrize(
    ("says", "reason"),
    [
        (features_to_text(np.full((3, 8), np.nan, np.float32)), "finite values for each of 3 slots"),
        (features_to_text(np.zeros((2, 8), np.float32)), "finite values for each of 3 slots"),
        ("no base64!", "finite values for each of 3 slots"),
        ("", "Train with `train_slots"),
    ],
)
def test_features_that_are_none_cost_their_client_alone(says, reason, caplog):
    asked, strategy = [], tac()
    apps = [client(name, asked, says=says if name == "2" else None) for name in TASKS]
    with caplog.at_level(logging.WARNING, "fedkit"):
        run(strategy, apps)
    assert reason in caplog.text
    assert strategy.state.assignment.keys() == TASKS.keys() - {"2"}
    assert cluster_accuracy(strategy.state.assignment, {k: v for k, v in TASKS.items() if k != "2"}) == 1.0
    assert all(wanted for name, wanted in asked if name == "2"), "it is asked until it says them"


def test_features_travel_at_half_precision_and_wide_ones_as_sketches():
    rng = np.random.default_rng(0)
    narrow, wide = rng.normal(size=(2, 40)).astype(np.float32), rng.normal(size=(60, 3 * MOST)).astype(np.float32)
    rows = features_from_text(features_to_text(narrow), 2)
    np.testing.assert_array_equal([row[0, :40] for row in rows], narrow.astype(np.float16))
    assert all(row.shape == (2, WIDTH) and not row[1].any() for row in rows)
    seen = np.stack([row[0] for row in features_from_text(features_to_text(wide), 60)])
    ratios = np.square(seen[1:] - seen[:-1]).sum(1) / np.square(wide[1:] - wide[:-1]).sum(1)
    assert abs(ratios.mean() - 1) < 0.1, "distances are kept in the mean"


def test_what_cannot_be_features_is_a_reply_error():
    for text in (features_to_text(np.zeros((1, 5), np.float32))[:-4], "AAA", 7, "é"):
        with pytest.raises(ReplyError, match="features: expected 1 to 512"):
            features_from_text(text, 3)
    with pytest.raises(ConfigError, match="evidence: expected one of auto, adapters, updates, features"):
        tac(evidence="labels")


@pytest.mark.parametrize("evidence", ["features", "auto"])
def test_a_client_that_gets_another_task_is_asked_once_more(evidence):
    asked, strategy = [], tac(evidence=evidence)
    TASKS["1"] = (2,)
    apps = [client(name, asked) for name in TASKS]

    def later(server_round, arrays):
        TASKS["1"] = (2,) if server_round < 2 else (2, 0)

    try:
        strategy.start(RoundGrid(InProcessGrid(apps)), initial(), num_rounds=5, evaluate_fn=later)
    finally:
        tasks, TASKS["1"] = dict(TASKS), (2,)
    assert len(strategy.state.assignment["1"]) == 2
    assert cluster_accuracy(strategy.state.assignment, tasks) == 1.0
    assert [wanted for name, wanted in asked if name == "1"] == [True, False, False, True, False]


def test_features_beyond_float16_are_its_largest():
    (row,) = features_from_text(features_to_text(np.array([[1e6, -1e6, 2.0]], np.float32)), 1)
    assert row[0, :3].tolist() == [65504.0, -65504.0, 2.0]


def test_what_fp32_would_take_counts_the_slots_of_each_client_not_all_clusters(tmp_path):
    grid = RoundGrid(InProcessGrid([client(name, []) for name in TASKS]))
    strategy = tac()
    record = grid.ledger.recording(None, to=tmp_path)
    strategy.start(grid, initial(), num_rounds=2, evaluate_fn=record)
    slots, adapter = sum(map(len, TASKS.values())), num_values(to_arrays(initial()))
    assert read_rounds(tmp_path / "rounds.jsonl")[2]["fp32-bytes"] == 4 * slots * adapter
