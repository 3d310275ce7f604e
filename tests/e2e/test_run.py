"""`fedkit run` with a real SuperLink and Ray, on the smallest app there is."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest

from fedkit.launch import processes_with

TINY_APP = Path(__file__).parents[1] / "fixtures" / "tiny_app"

pytestmark = pytest.mark.deployment


def start(out: Path, mark: str, *options: str) -> subprocess.Popen[str]:
    """Start `fedkit run` on the tiny app with `mark` in its environment."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedkit.cli", "run", str(TINY_APP), "--out", str(out), *options],
        env=os.environ | dict([mark.split("=")]),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_runs_side_by_side_one_completes_and_one_is_terminated(tmp_path: Path) -> None:
    marks = [f"FEDKIT_TEST={uuid.uuid4()}" for _ in range(2)]
    done = start(tmp_path / "done", marks[0])
    ended = start(tmp_path / "ended", marks[1], "--run-config", "round-seconds=60.0")
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "ended/fedavg-seed0/rounds.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        ended.send_signal(signal.SIGTERM)
        ended.communicate(timeout=20)
        assert ended.returncode == 128 + signal.SIGTERM
        record = json.loads((tmp_path / "ended/fedavg-seed0/run.json").read_text())
        assert record["status"] == "interrupted"

        output, error = done.communicate(timeout=90)
        assert done.returncode == 0, error
        assert "round 2/2" in output
        record = json.loads((tmp_path / "done/fedavg-seed0/run.json").read_text())
        assert record["status"] == "completed"
        assert "ROUND 2/2" in (tmp_path / "done/fedavg-seed0/flower.log").read_text()
    finally:
        done.kill()
        ended.kill()
    assert [list(processes_with(mark)) for mark in marks] == [[], []]


def test_a_failing_app_ends_with_its_traceback(tmp_path: Path) -> None:
    mark = f"FEDKIT_TEST={uuid.uuid4()}"
    failing = start(tmp_path / "out", mark, "--run-config", "fail-in-round=1")
    _, error = failing.communicate(timeout=90)
    assert failing.returncode == 1
    assert "RuntimeError: the tiny app was told to fail" in error
    assert str(tmp_path / "out/fedavg-seed0/flower.log") in error
    assert not list(processes_with(mark))
