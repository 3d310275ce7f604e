"""What a plan says a run will cost, beside what such a run does cost."""

from __future__ import annotations

import io
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict
from rich.console import Console

from fedkit import cli, rehearsal
from fedkit.config import Scalar
from fedkit.forecast import COUNTS, Forecast, forecast_table, prolonged, share_lost
from fedkit.in_process import InProcessGrid
from fedkit.plan import Plan, common, read_app
from fedkit.rehearsal import rehearse
from fedkit.report import read_rounds
from fedkit.report.figures import total
from fedkit.report.page import page
from fedkit.report.reading import read_arms
from fedkit.state import STATE_DIR
from fedkit.strategies import STRATEGIES
from tests.helpers.runs import write_run
from tests.helpers.superlink import FakeSuperLink

TINY_APP = Path(__file__).parent / "fixtures" / "tiny_app"
TOLERANCE = (
    0.06  # of a run's bytes in either direction: an app's metrics, and the form of its updates, are its own
)


@pytest.fixture(autouse=True)
def _as_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what a rehearsal changes in its process be changed back."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv(STATE_DIR, "")


def config_of(strategy: str, **more: Scalar) -> dict[str, Scalar]:
    return read_app(TINY_APP)[1] | {"strategy": strategy, "num-rounds": 5, "num-clients": 4} | more


def run(config: dict[str, Scalar], folder: Path) -> list[Any]:
    """Return the rounds of a run in which the tiny app's clients really train."""
    sys.path.insert(0, str(TINY_APP))
    from tiny_app import client_app, server_app

    config = config | {"run-dir": str(folder)}
    grid = InProcessGrid([client_app.app] * int(config["num-clients"]), config)
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
    server_app.app(grid, context)
    return [row for row in read_rounds(folder / "rounds.jsonl") if row["round"]]


MORE = [pytest.param(*case, marks=pytest.mark.slow) for case in (("aquila", 0.0), ("safari", 0.3), ("tac", 0.0))]


@pytest.mark.parametrize(("strategy", "drop"), [("fedavg", 0.0), ("aquila", 0.3), *MORE])
def test_a_forecast_is_what_a_run_sends_within_the_tolerance(tmp_path: Path, strategy: str, drop: float) -> None:
    config = config_of(strategy, drop=drop)
    found = rehearse(TINY_APP, config, 3, tmp_path / "rehearsal")
    rows = prolonged(found["rounds"], 5, partial(share_lost, common(config).schedule(), 4))
    done = run(config, tmp_path / "run")
    assert len(rows) == len(done) == 5
    assert total(rows, "asked") == total(done, "asked")
    for key in ("uplink-bytes", "downlink-bytes"):
        assert total(rows, key) == pytest.approx(total(done, key), rel=TOLERANCE)
    if strategy != "fedavg":  # whose clients have other ids each time, and so another schedule of losses
        assert total(rows, "missing") == total(done, "missing")
    assert (found["clients"], found["values"]) == (4, 64)
    assert found["peak-bytes"] > 4 * 64
    assert (found["state-bytes"] > 0) == (strategy != "fedavg")


def test_of_more_clients_than_take_part_each_stands_for_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "MOST_CLIENTS", 2)
    found = rehearse(TINY_APP, config_of("aquila"), 1, tmp_path)
    assert found["clients"] == found["rounds"][0]["asked"] == 2


def test_what_is_not_rehearsed_is_like_the_rounds_after_the_first() -> None:
    rows = [{"round": k, **dict.fromkeys(COUNTS, value)} for k, value in ((1, 900), (2, 100), (3, 110))]
    later = prolonged(rows, 5, lambda _: 0.5)[3:]
    assert [row["round"] for row in later] == [4, 5]
    assert [(row["uplink-bytes"], row["missing"]) for row in later] == [(105, 52)] * 2
    assert prolonged(rows[:1], 2, lambda _: 0.0)[1] == rows[0] | {"round": 2, "missing": 0}


def test_what_a_fault_schedule_loses_is_foreseen(tmp_path: Path) -> None:
    """Losses of a group, in bursts, and of single replies: as many replies are missing as then are."""
    bursts, events = {"begin": 0.2, "end": 0.4}, [{"round": 2, "client": "0", "lost": True}]
    faults = json.dumps({"seed": 5, "groups": {"[23]": 0.5}, "bursts": bursts, "events": events})
    config = config_of("aquila", faults=faults, **{"num-rounds": 8})
    done = run(config, tmp_path / "run")
    lost = [round(4 * share_lost(common(config).schedule(), 4, k)) for k in range(1, 9)]
    assert sum(lost) > 5
    assert [row["missing"] for row in done] == lost


def test_who_skips_is_counted_if_clients_train(tmp_path: Path) -> None:
    config = config_of("aquila", **{"strategy-options": "beta=50.0"})
    found = rehearse(TINY_APP, config, 5, tmp_path / "rehearsal", train=True)
    done = run(config, tmp_path / "run")
    assert [row["skips"] for row in found["rounds"]] == [row["skips"] for row in done]
    assert total(found["rounds"], "skips") > 0
    assert total(found["rounds"], "uplink-bytes") == pytest.approx(total(done, "uplink-bytes"), rel=TOLERANCE)
    still = rehearse(TINY_APP, config, 5, tmp_path / "still")
    assert total(still["rounds"], "skips") == 0


def test_a_plan_is_kept_can_be_carried_out_and_is_shown_beside_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--strategy", "aquila", "--rounds", "4", "--out", "out"]
    assert cli.main(["plan", str(TINY_APP), *options]) == 0
    said = capsys.readouterr().out
    assert "Expected in 4 rounds" in said
    assert "fedkit resume out" in said
    assert Plan.load(Path("out")).arms[0].config["num-rounds"] == 4
    kept = json.loads(Path("out/aquila-seed0/forecast.json").read_text())
    assert [row["round"] for row in kept["rounds"]] == [1, 2, 3, 4]
    assert kept["rehearsed"] == 3
    assert "was not begun" in page(read_arms([Path("out")]))
    assert cli.main(["plan", "out", "--rounds", "9"]) == 2
    assert "Leave out --rounds" in capsys.readouterr().err

    class Mine(FakeSuperLink):
        pass

    monkeypatch.setattr(cli, "SuperLink", Mine)
    assert cli.main(["resume", "out"]) == 0
    assert Mine.ran == ["aquila-seed0"]
    assert "What fedkit plan expected" in page(read_arms([Path("out")]))


def test_a_report_has_what_was_predicted_beside_what_was_measured(tmp_path: Path) -> None:
    arms = write_run(tmp_path / "run", ["aquila"], seeds=1, rounds=2)
    rows = [{"round": k, **dict.fromkeys(COUNTS, 440)} for k in (1, 2, 3)]
    Forecast("aquila", rows, 3, values=10, state=1.0, peak=2.0).save(arms[0])
    text = page(read_arms([tmp_path / "run"]))
    assert "aquila, seed 0, uplink</th><td>880 B</td><td>800 B</td><td>+10.0 %</td>" in text
    assert "as predicted" in text


def test_a_server_that_does_not_run_here_is_an_error_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    pyproject = (TINY_APP / "pyproject.toml").read_text()
    Path("pyproject.toml").write_text(pyproject.replace("tiny_app.server_app", "nowhere.server_app"))
    assert cli.main(["plan", "."]) == 1
    said = capsys.readouterr().err
    assert "cannot be rehearsed here" in said
    assert "No module named" in said


def test_a_forecast_fits_a_terminal_of_80_columns() -> None:
    row = {"round": 1, **dict.fromkeys(COUNTS, 123_456_789)}
    forecasts = {name: Forecast(name, [row] * 2, 2, values=10**6, state=1.0, peak=1.0) for name in STRATEGIES}
    console = Console(width=80, file=io.StringIO())
    console.print(forecast_table(forecasts))
    assert "…" not in console.file.getvalue()


def test_a_server_that_ignores_the_strategy_is_told_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(TINY_APP, tmp_path / "app")
    server = tmp_path / "app" / "tiny_app" / "server_app.py"
    server.write_text(server.read_text().replace("build(config)", "build(Config(num_clients=config.num_clients))"))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "app", "--strategy", "safari", "--rehearse", "2"]) == 0
    assert "warning: safari, seed 0: the app started Aquila, not Safari" in capsys.readouterr().out
    assert cli.main(["plan", "app", "--strategy", "aquila", "--rehearse", "2"]) == 0
    assert "warning" not in capsys.readouterr().out
