"""A run that was asked for something and did something else says so, and is no success."""

import json

import pytest
from flwr.clientapp import ClientApp

from fedkit.errors import OutcomeError
from fedkit.ledger import ROUNDS
from fedkit.outcome import check_outcome
from fedkit.plan import Arm
from fedkit.record import LOG
from fedkit.report import read_rounds
from fedkit.report.tables import refused_lines, totals_line
from fedkit.rounds import RoundGrid
from fedkit.strategies import Safari
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import client_app, initial, targets

GOOD = {"asked": 4, "replies": 4, "rejected": 0}


@pytest.fixture
def arm(tmp_path):
    return Arm({"strategy": "safari", "seed": 0, "num-rounds": 2}, tmp_path)


def write(arm, *rows, log=""):
    lines = [{"round": 0}, *({"round": k, **row} for k, row in enumerate(rows, 1))]
    (arm.run_dir / ROUNDS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (arm.run_dir / LOG).write_text(log)


def test_what_went_well_needs_no_word(arm):
    write(arm, GOOD, GOOD | {"replies": 0, "rejected": 4}, log="INFO : Starting Safari strategy:")
    assert check_outcome(arm) == []


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([], "recorded no round"),
        ([{"asked": 0, "replies": 0, "rejected": 0}] * 2, "RoundGrid"),
        (
            [GOOD | {"replies": 0, "rejected": 4, "refused": {"1": "no arrays"}}],
            "every reply was refused.*no arrays",
        ),
    ],
)
def test_a_run_that_recorded_counted_or_used_nothing_has_failed(arm, rows, reason):
    write(arm, *rows)
    with pytest.raises(OutcomeError, match=reason):
        check_outcome(arm)


def test_an_app_that_constructs_a_strategy_of_its_own_is_named(arm):
    write(arm, GOOD, log="\x1b[92mINFO \x1b[0m:      Starting Aquila strategy:\n")
    (warning,) = check_outcome(arm)
    assert "started Aquila, not Safari" in warning
    write(arm, GOOD, log="Starting MyOwn strategy:")
    assert check_outcome(arm) == []


def test_why_replies_were_refused_is_recorded_by_client_and_shown(tmp_path):
    broken = ClientApp()

    @broken.train()
    def train(message, context):
        raise RuntimeError("my client broke")

    grid = RoundGrid(InProcessGrid([client_app([], targets(2)[0]), broken]))
    strategy = Safari(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    strategy.start(grid, initial(), num_rounds=2, evaluate_fn=grid.ledger.recording(None, to=tmp_path))
    rows = [row for row in read_rounds(tmp_path / ROUNDS) if row["round"]]
    (lacking, broke) = (rows[0]["refused"][name] for name in ("1000", "1001"))
    assert "lacks this strategy's mod" in lacking
    assert "my client broke" in broke
    assert "rejected 4" in totals_line(rows)
    assert len(refused_lines(rows)) == 2
