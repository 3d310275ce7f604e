"""A run that is killed at any moment, and resumed, ends as if nothing had happened."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedkit.processes import processes_with
from fedkit.report import read_rounds

TINY_APP = Path(__file__).parents[1] / "fixtures" / "tiny_app"
ROUNDS, KILLS = 6, 2
ARMS = {name: f"{name}-seed0" for name in ("aquila", "error-feedback", "fedavg", "safari")}
pytestmark = [pytest.mark.deployment, pytest.mark.slow]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Return a setting that is in the environment of this test's processes alone, and clean up after them."""
    setting, folder = f"FEDKIT_TEST={uuid.uuid4()}", tempfile.mkdtemp(dir="/tmp")  # short, for Ray's sockets
    monkeypatch.setenv(*setting.split("="))
    monkeypatch.setenv("RAY_TMPDIR", folder)
    yield setting
    kill(setting)
    shutil.rmtree(folder, ignore_errors=True)


def kill(mark: str) -> None:
    """Kill all processes of a run at once, and those that they start meanwhile."""
    while pids := [pid for pid in processes_with(mark) if pid != os.getpid()]:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)


def left_behind(mark: str) -> list[str]:
    """Return the command lines of what a run that has ended left behind; what was killed may take a moment."""
    deadline, lines = time.monotonic() + 10, [""]
    while lines and time.monotonic() < deadline:
        time.sleep(0.1)
        lines = []
        for pid in processes_with(mark):
            with suppress(OSError):  # it has ended meanwhile
                if pid != os.getpid():
                    lines.append(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " "))
    return lines


def fedkit(*arguments: object) -> subprocess.Popen[str]:
    """Start the command."""
    command = [sys.executable, "-m", "fedkit.cli", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # a shell without job control lets what it starts in the background ignore Ctrl-C, the tests themselves too
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return the output of a command that must succeed."""
    output, _ = process.communicate(timeout=180)
    assert process.returncode == 0, output
    return output


def begin(out: Path, strategies: list[str], **config: object) -> subprocess.Popen[str]:
    """Start a run of one arm for each strategy, one or two."""
    options = [f"{key.replace('_', '-')}={value}" for key, value in config.items()]
    compare = ["--compare", strategies[1]] if strategies[1:] else []
    command = ["run", TINY_APP, "--out", out, "--rounds", ROUNDS, "--strategy", strategies[0], *compare]
    return fedkit(*command, "--run-config", "round-seconds=0.3", *options)


def result(out: Path, strategy: str) -> dict[str, Any]:
    """Return what must not depend on interruptions: the model, the metrics, the frame bytes."""
    folder = out / ARMS[strategy]
    lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(ROUNDS + 1)), "each round once"
    frames: Counter[tuple[int, str, str]] = Counter()
    entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    clients = {entry["node-id"]: entry["client"] for entry in entries}  # once they are known
    for entry in entries:
        frames[entry["server-round"], clients[entry["node-id"]], entry["direction"]] += entry["frame-bytes"]
    keys = ("round", "accuracy", "loss", "asked", "replies", "skips", "missing", "uplink-frame-bytes")
    with np.load(folder / "model.npz") as model:
        arrays = {name: (array.dtype.str, array.shape, array.tobytes()) for name, array in model.items()}
    return {
        "model": arrays,
        "rounds": [{key: line[key] for key in (*keys, "downlink-frame-bytes")} for line in lines],
        "frames": {key: size for key, size in frames.items() if size},
    }


def killed_somewhere(out: Path, strategy: str, process: subprocess.Popen[str], mark: str, wait: float) -> None:
    """Kill a run so many seconds after round 1 of an arm."""
    path, deadline = out / ARMS[strategy] / "rounds.jsonl", time.monotonic() + 120
    while len(read_rounds(path)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    time.sleep(wait)
    recorded = read_rounds(path)[-1]["round"]
    kill(mark)
    process.wait()
    print(f"killed in {strategy}, {wait:.2f} s after round 1; {recorded} rounds were recorded")


@pytest.mark.parametrize(
    ("strategies", "config"),
    [
        pytest.param(["aquila", "safari"], {}, id="all clients"),
        pytest.param(
            ["error-feedback"],
            {"num_clients": 4, "fraction": 0.5},
            id="half of the clients",
            marks=pytest.mark.full,
        ),
    ],
)
def test_a_killed_run_ends_as_one_that_was_not(
    tmp_path: Path, mark: str, strategies: list[str], config: dict[str, object]
) -> None:
    output = finish(begin(tmp_path / "whole", strategies, **config))
    expected = {name: result(tmp_path / "whole", name) for name in strategies}
    rows = read_rounds(tmp_path / "whole" / ARMS[strategies[0]] / "rounds.jsonl")
    span = rows[-1]["seconds"] - rows[1]["seconds"]
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed of the kill moments: {seed}; rounds 2 to {ROUNDS} take {span:.2f} s")
    rng = random.Random(seed)
    for number in range(KILLS):
        out, strategy = tmp_path / f"killed-{number}", strategies[number % len(strategies)]
        killed_somewhere(out, strategy, begin(out, strategies, **config), mark, rng.uniform(0, span))
        resumed = finish(fedkit("resume", out))
        assert {name: result(out, name) for name in strategies} == expected
        assert (out / "summary.json").exists()
        run = json.loads((out / ARMS[strategy] / "run.json").read_text())
        assert run["status"] == "completed"
        assert len(run.get("resumptions", [])) <= 1  # none, if it was killed at its very end
    if len(strategies) > 1:
        assert "Summary" in output
        assert "Summary" in resumed
    assert "Nothing is left to do" in finish(fedkit("resume", out))


def test_an_arm_of_flowers_fedavg_starts_again_and_an_interrupted_one_says_how_to_take_it_up(
    tmp_path: Path, mark: str
) -> None:
    out = tmp_path / "out"
    process = begin(out, ["fedavg"], round_seconds=2.0)  # so that it is under way when it is interrupted
    path, deadline = out / ARMS["fedavg"] / "rounds.jsonl", time.monotonic() + 120
    while len(read_rounds(path)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert output.endswith(f"Take it up with: fedkit resume {out}\n")
    assert not left_behind(mark)
    shown = finish(fedkit("resume", out / ARMS["fedavg"]))
    assert all(f"round {number}/{ROUNDS}" in shown for number in range(1, ROUNDS + 1))
    assert result(out, "fedavg")["rounds"][-1]["replies"] == 3
