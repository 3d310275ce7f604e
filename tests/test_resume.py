"""`fedkit resume` up to the point where Flower would start."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedkit import cli
from fedkit.config import RunConfig
from fedkit.errors import ConfigError, LaunchError
from fedkit.plan import Plan
from fedkit.processes import processes_with
from fedkit.report import read_rounds
from fedkit.strategies import STRATEGIES, UpdateStrategy, build
from tests.helpers.superlink import FakeSuperLink, row

TINY_APP = Path(__file__).parent / "fixtures" / "tiny_app"


@pytest.fixture
def superlink(superlink: type[FakeSuperLink]) -> type[FakeSuperLink]:
    shutil.copytree(TINY_APP, "app")
    return superlink


def run(*options: str) -> int:
    """Run two strategies with two seeds each."""
    arms = ["--strategy", "aquila", "--compare", "fedavg", "--seeds", "2", "--rounds", "3"]
    return cli.main(["run", "app", "--out", "out", *arms, *options])


def record(arm: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(Path("out", arm, "run.json").read_text())
    return content


@pytest.mark.parametrize(
    ("end", "code", "status"),
    [(LaunchError("it broke"), 1, "failed"), (KeyboardInterrupt(), 130, "interrupted")],
)
def test_what_was_left_is_run_and_nothing_else(
    superlink: type[FakeSuperLink],
    capsys: pytest.CaptureFixture[str],
    end: BaseException,
    code: int,
    status: str,
) -> None:
    assert run() == 0
    expected = Path("out/summary.json").read_text()
    shutil.rmtree("out")
    superlink.ran.clear()
    superlink.ends = {2: end}
    assert run() == code
    assert capsys.readouterr().err.endswith("\nTake it up with: fedkit resume out\n")
    began = record("aquila-seed1")
    assert began["status"] == status
    assert not Path("out/summary.json").exists()

    assert cli.main(["resume", "out"]) == 0
    assert superlink.ran == ["aquila-seed0", "aquila-seed1", "aquila-seed1", "fedavg-seed0", "fedavg-seed1"]
    assert Path("out/summary.json").read_text() == expected
    shown = capsys.readouterr().out
    assert "aquila, seed 1  round 1/3" not in shown, "rounds that were there are not shown again"
    assert "aquila, seed 1  round 2/3  accuracy 0.5000  up 30 B" in shown, "but they count"
    assert shown.rindex("aquila, seed 0") < shown.index("aquila, seed 1") < shown.index("Summary")
    now = record("aquila-seed1")
    assert (now["status"], now["started"]) == ("completed", began["started"])
    (resumption,) = now["resumptions"]
    assert resumption["after-status"] == status
    assert "resumptions" not in record("aquila-seed0")
    assert Path("out/aquila-seed1/flower.1.log").read_text() == "attempt 1"


def test_a_run_that_was_killed_outright_is_taken_up(superlink: type[FakeSuperLink]) -> None:
    assert run() == 0
    path = Path("out/aquila-seed0/run.json")
    path.write_text(json.dumps(record("aquila-seed0") | {"status": "running", "finished": None}))
    for arm in ("fedavg-seed0", "fedavg-seed1"):
        shutil.rmtree(f"out/{arm}")
    Path("out/fedavg-seed0").mkdir()  # killed before its first record
    superlink.ran.clear()
    assert cli.main(["resume", "out"]) == 0
    assert superlink.ran == ["aquila-seed0", "fedavg-seed0", "fedavg-seed1"]


def test_an_arm_without_a_checkpoint_starts_again(superlink: type[FakeSuperLink]) -> None:
    superlink.ends = {1: LaunchError("it broke")}
    assert cli.main(["run", "app", "--out", "out", "--strategy", "fedavg", "--rounds", "3"]) == 1
    Path("out/fedavg-seed0/rounds.jsonl").write_text(json.dumps(row(7)) + "\n")
    assert cli.main(["resume", "out"]) == 0
    assert [line["round"] for line in read_rounds(Path("out/fedavg-seed0/rounds.jsonl"))] == [0, 1, 2, 3]


def test_one_arm_is_resumed_alone(superlink: type[FakeSuperLink]) -> None:
    superlink.ends = {1: LaunchError("it broke")}
    assert run() == 1
    assert cli.main(["resume", "out/aquila-seed0"]) == 0
    assert superlink.ran == ["aquila-seed0", "aquila-seed0"]
    assert not Path("out/summary.json").exists()
    assert cli.main(["resume", "out"]) == 0
    assert Path("out/summary.json").exists()


def test_with_nothing_left_the_tables_are_shown_whatever_became_of_the_app(
    superlink: type[FakeSuperLink], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run() == 0
    shutil.rmtree("app")
    Path("out/summary.json").unlink()
    superlink.ran.clear()
    assert cli.main(["resume", "out"]) == 0
    shown = capsys.readouterr().out
    assert "Nothing is left to do in out/" in shown
    assert "Summary" in shown
    assert superlink.ran == []
    assert Path("out/summary.json").exists()


def test_the_folder_may_be_moved(superlink: type[FakeSuperLink], tmp_path: Path) -> None:
    superlink.ends = {2: LaunchError("it broke")}
    assert run() == 1
    Path("out").rename("moved")
    assert cli.main(["resume", "moved"]) == 0
    assert not Path("out").exists()
    config = json.loads(Path("moved/aquila-seed1/run.json").read_text())["run-config"]
    assert config["run-dir"] == str(tmp_path / "moved/aquila-seed1")


def break_keys() -> None:
    path = Path("app/pyproject.toml")
    path.write_text(path.read_text().replace("fraction = 1.0", "share = 1.0"))


def break_types() -> None:
    path = Path("app/pyproject.toml")
    path.write_text(path.read_text().replace("fraction = 1.0", "fraction = 'all'"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: shutil.rmtree("app"), "the app: expected a directory"),
        (break_keys, "got a difference in 'fraction', 'share'"),
        (break_types, "run-config key 'fraction': expected str, got float"),
        (lambda: Path("out/plan.json").unlink(), "expected the folder of a `fedkit run`"),
        (lambda: Path("out/plan.json").write_text("{"), "Was it damaged"),
        (lambda: Path("out/plan.json").write_text("[]"), "Was it damaged"),
        (lambda: Path("out/aquila-seed0/run.json").write_text("{"), "Delete it to run it again"),
    ],
)
def test_what_cannot_be_resumed_is_refused(
    superlink: type[FakeSuperLink],
    capsys: pytest.CaptureFixture[str],
    change: Callable[[], object],
    message: str,
) -> None:
    superlink.ends = {1: LaunchError("it broke")}
    assert run() == 1
    change()
    superlink.ran.clear()
    assert cli.main(["resume", "out"]) == 2
    assert message in capsys.readouterr().err
    assert superlink.ran == []


def test_a_folder_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["resume", str(tmp_path / "absent")]) == 2
    assert "expected the folder of a `fedkit run`" in capsys.readouterr().err


def test_a_run_that_goes_on_is_left_alone(
    superlink: type[FakeSuperLink], capsys: pytest.CaptureFixture[str]
) -> None:
    superlink.ends = {1: LaunchError("it broke")}
    assert run() == 1
    with Plan.load(Path("out")).locked():
        assert cli.main(["resume", "out"]) == 2
    assert "another command is at" in capsys.readouterr().err


def test_another_version_is_named(superlink: type[FakeSuperLink], capsys: pytest.CaptureFixture[str]) -> None:
    superlink.ends = {1: LaunchError("it broke")}
    assert run() == 1
    path = Path("out/plan.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"fedkit": "0.0.1"}))
    assert cli.main(["resume", "out"]) == 0
    assert "begun with fedkit 0.0.1, this is " in capsys.readouterr().err


def test_what_a_killed_command_left_behind_is_ended(superlink: type[FakeSuperLink], tmp_path: Path) -> None:
    superlink.ends = {1: LaunchError("it broke")}
    assert run() == 1
    mark = f"{cli.RUN_MARK}={tmp_path / 'out'}"
    code = "import time; print(flush=True); time.sleep(60)"
    orphan = subprocess.Popen(
        [sys.executable, "-c", code], env=dict([mark.split("=")]), stdout=subprocess.PIPE, start_new_session=True
    )
    assert orphan.stdout is not None
    orphan.stdout.readline()
    assert list(processes_with(mark)) == [orphan.pid]
    assert cli.main(["resume", "out"]) == 0
    assert orphan.wait(1) != 0


def test_a_plan_is_read_as_it_was_saved(superlink: type[FakeSuperLink]) -> None:
    assert run() == 0
    plan = Plan.load(Path("out"))
    plan.save()
    assert Plan.load(Path("out")) == plan
    with pytest.raises(ConfigError):
        Plan.load(Path("app"))


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "fedavg"])
def test_every_strategy_but_flowers_saves_itself_in_the_run_dir(name: str, tmp_path: Path) -> None:
    for run_dir, folder in (("", None), (str(tmp_path), tmp_path)):
        strategy = build(RunConfig(strategy=name, run_dir=run_dir))
        assert isinstance(strategy, UpdateStrategy)
        assert strategy.progress.folder == folder
    build(RunConfig(strategy="fedavg", run_dir=str(tmp_path)))
