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
from typing import Any

import pytest

from fedkit.processes import processes_with

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


def record(out: Path) -> dict[str, Any]:
    """Return the `run.json` of a command's only arm."""
    content: dict[str, Any] = json.loads((out / "fedavg-seed0/run.json").read_text())
    return content


@pytest.mark.slow
def test_of_three_runs_side_by_side_one_completes_one_fails_and_one_is_terminated(tmp_path: Path) -> None:
    options = {"done": "seed=0", "failed": "fail-in-round=1", "ended": "round-seconds=60.0"}
    marks = {name: f"FEDKIT_TEST={uuid.uuid4()}" for name in options}
    runs = {name: start(tmp_path / name, marks[name], "--run-config", options[name]) for name in options}
    try:
        deadline = time.monotonic() + 90
        while not (tmp_path / "ended/fedavg-seed0/rounds.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.2)
        runs["ended"].send_signal(signal.SIGTERM)  # in the middle of its first round, or of Ray's start
        runs["ended"].communicate(timeout=20)
        assert runs["ended"].returncode == 128 + signal.SIGTERM
        assert record(tmp_path / "ended")["status"] == "interrupted"

        output, error = runs["done"].communicate(timeout=120)
        assert runs["done"].returncode == 0, error
        assert "round 2/2" in output
        assert record(tmp_path / "done")["status"] == "completed"
        assert "ROUND 2/2" in (tmp_path / "done/fedavg-seed0/flower.log").read_text()

        _, error = runs["failed"].communicate(timeout=120)
        assert runs["failed"].returncode == 1
        assert "RuntimeError: the tiny app was told to fail" in error
        assert str(tmp_path / "failed/fedavg-seed0/flower.log") in error
        assert record(tmp_path / "failed")["status"] == "failed"
    finally:
        for run in runs.values():
            run.terminate()
            run.wait()
    assert {name: list(processes_with(mark)) for name, mark in marks.items()} == {name: [] for name in marks}
