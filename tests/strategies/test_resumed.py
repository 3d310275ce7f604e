"""A server that crashes in the middle of a round runs it again, and everything ends as if it had not crashed."""

import json
from collections import Counter
from functools import partial

import numpy as np
import pytest

from fedkit.aggregation.missing import Missing
from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod, TacMod
from fedkit.errors import CrashError
from fedkit.faults import Event, Faults
from fedkit.memory import rewind
from fedkit.message import to_arrays
from fedkit.rounds import RoundGrid
from fedkit.skipping import SkipRule
from fedkit.state import STATE_DIR
from fedkit.strategies import Aquila, ErrorFeedback, Marina, Plain, Safari, Tac
from tests.helpers.grid import InProcessGrid, VirtualTime
from tests.helpers.quadratic import client_app, initial, targets

ROUNDS = 5
LOST = Faults(events=(Event(2, "1", lost=True), Event(4, "1", lost=True), Event(5, "3", lost=True)))
SCHEMES = {
    "aquila": (Aquila, {"beta": 0.3}),
    "aquila, dense downlink": (Aquila, {"downlink": None}),
    "aquila, one sum": (Aquila, {"memory": "sum"}),
    "laq": (partial(Aquila.laq, rule=SkipRule.laq(weight=0.5, patience=2)), {}),
    "aquila, own B": (Aquila, {"downlink": None, "lora": "fedsa"}),
    "plain, products": (Plain, {"downlink": None, "lora": "product"}),
    "plain, reweighted": (Plain, {"missing": "reweight"}),
    "plain, products, surrogates": (Plain, {"downlink": None, "lora": "product", "missing": "safari"}),
    "error-feedback": (ErrorFeedback, {}),
    "error-feedback, last updates": (ErrorFeedback, {"missing": "mifa"}),
    "safari": (Safari, {}),
    "safari, models that move on": (Safari, {"missing": Missing(surrogate="update", warmup_rounds=1)}),
    "safari, published": (Safari.published, {}),
    "tac": (Tac, {"num_clusters": 2}),
    "tac, by updates": (Tac, {"num_clusters": 2, "evidence": "updates"}),
    "tac, a lazy sum": (Tac, {"num_clusters": 2, "skip": SkipRule.aquila(0.3)}),
    "tac, masks and surrogates": (Tac, {"num_clusters": 2, "density": 0.5, "missing": "safari"}),
}
MARINA = (Marina, {"whole": 0.3})  # needs everybody


class Crashing:
    """Tests the model; in one round the server crashes just before it would save itself."""

    def __init__(self, crash_round=None):
        self.crash_round = crash_round

    def __call__(self, server_round, arrays):
        if server_round == self.crash_round:
            raise CrashError("now")


def run(scheme, folder, *, nodes, crash_round=None, fraction=1.0):
    """Run all rounds that are left with new nodes; return the arrays, and the bytes of frames."""
    make, options = scheme
    mods = [AquilaMod(), ErrorFeedbackMod(), SafariMod(), TacMod()]
    grid = InProcessGrid([client_app(mods, target, num_examples=5 + i) for i, target in enumerate(targets(4))])
    grid.apps = {nodes - i: app for i, app in enumerate(grid.apps.values())}  # with other ids
    grid.contexts = {nodes - i: context for i, context in enumerate(grid.contexts.values())}
    strategy = make(
        **options, checkpoint=folder, fraction_evaluate=0.0, fraction_train=fraction, min_train_nodes=2
    )
    faults = LOST if "missing" in options or make in (Safari, Safari.published) else None
    rounds = RoundGrid(grid, clock=VirtualTime(), faults=faults)
    evaluate = rounds.ledger.recording(Crashing(crash_round), to=folder)
    result = strategy.start(rounds, initial(), num_rounds=ROUNDS, evaluate_fn=evaluate)
    frames = Counter()
    entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    clients = {entry["node-id"]: entry["client"] for entry in entries}
    for entry in entries:
        if entry["frame-bytes"]:
            key = entry["server-round"], clients[entry["node-id"]], entry["direction"]
            frames[key] += entry["frame-bytes"]
    return np.concatenate([a.ravel() for a in to_arrays(result.arrays).values()]), frames


EVERYBODY_OR_HALF = [(name, fraction) for name in SCHEMES for fraction in (1.0, 0.5)]


@pytest.mark.parametrize(("name", "fraction"), [*EVERYBODY_OR_HALF, ("marina", 1.0)])
def test_a_round_that_is_run_again_leaves_no_trace(name, fraction, tmp_path, monkeypatch):
    monkeypatch.setenv(STATE_DIR, str(tmp_path / "whole-clients"))
    scheme = SCHEMES.get(name, MARINA)
    params, frames = run(scheme, tmp_path / "whole", nodes=1000, fraction=fraction)
    monkeypatch.setenv(STATE_DIR, str(tmp_path / "clients"))
    for attempt, crash_round in enumerate((1, 3, 3)):
        with pytest.raises(CrashError):
            run(
                scheme,
                tmp_path / "crashed",
                nodes=2000 + 10 * attempt,
                crash_round=crash_round,
                fraction=fraction,
            )
    again, sent = run(scheme, tmp_path / "crashed", nodes=3000, fraction=fraction)
    np.testing.assert_array_equal(again, params)
    assert sent == frames
    rows = [json.loads(line) for line in (tmp_path / "crashed/rounds.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1))


def test_only_a_round_that_begins_again_is_rewound():
    state = {"x.residual": b"0", "y.other": b"-"}
    rewind(state, "x", 1)
    state |= {"x.residual": b"1", "x.new": b"+"}
    rewind(state, "x", 1)
    assert (state["x.residual"], "x.new" in state) == (b"0", False)
    state["x.residual"] = b"1"
    rewind(state, "x", 2)
    assert state["x.residual"] == b"1"
    assert state["y.other"] == b"-"
