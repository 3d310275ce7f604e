"""All four in one run: TAC over SAFARI-masked, AQUILA-coded RM-LoRA adapters, with 30 % of the replies lost."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.crashes import finish, kill_when_it_runs, start
from benchmarks.deployment import NAME, SUPERLINK, Deployment
from benchmarks.processes import wait_until
from fedkit.config import RUNS_DIR
from fedkit.report import read_rounds
from fedkit.state import STATE_DIR
from tests.e2e.test_resume import fedkit, kill, mark

APP = Path(__file__).parents[2] / "examples" / "multitask"
NODES, ROUNDS, ARM = 4, 8, "tac-seed0"
OPTIONS = [
    *("--strategy", "tac", "--rounds", str(ROUNDS), "--drop", "0.3", "--run-config", f"num-clients={NODES}"),
    *("r=4", "lora-alpha=8", "active-rank=2", "orth-reg-weight=0.1"),
    "strategy-options=\"density=0.5 min-bits=2 missing='safari'\"",
]
pytestmark = [pytest.mark.deployment, pytest.mark.slow]
__all__ = ["mark"]


def wait_for_rounds(recorded: Path, command: subprocess.Popen) -> None:
    """Wait until a run is in its fourth round."""
    wait_until(lambda: len(read_rounds(recorded)) > 3 or command.poll() is not None, f"no 3 rounds in {recorded}")
    assert command.poll() is None, "it is still under way"


def check(folder: Path) -> None:
    """Assert that a run learned, that its ledger agrees, and that what was lost was stood in for."""
    rows = read_rounds(folder / "rounds.jsonl")
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1)), "each round once"
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.1
    assert 0.1 < sum(row["missing"] for row in rows) / (NODES * ROUNDS) < 0.5
    assert any(row.get("stand-ins") for row in rows)
    assert not any(row["rejected"] for row in rows)
    entries = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    for way in ("uplink", "downlink"):
        sent = sum(entry["object-bytes"] for entry in entries if entry["direction"] == way)
        assert sent == sum(row[f"{way}-bytes"] for row in rows)
    assert sum(row["fp32-bytes"] for row in rows) > 10 * sum(row["uplink-bytes"] for row in rows)
    clusters = [json.loads(line)["round"] for line in (folder / "clusters.jsonl").read_text().splitlines()]
    assert clusters == list(range(1, ROUNDS + 1))
    assert len(list(folder.glob("adapters/*/adapter_config.json"))) == 5


def test_in_simulation_killed_and_resumed(tmp_path: Path, mark: str) -> None:
    run = fedkit("run", APP, "--out", tmp_path / "out", *OPTIONS)
    wait_for_rounds(tmp_path / "out" / ARM / "rounds.jsonl", run)
    kill(mark)
    run.wait()
    again = fedkit("resume", tmp_path / "out")
    said, _ = again.communicate(timeout=300)
    assert again.returncode == 0, said
    check(tmp_path / "out" / ARM)


@pytest.mark.full
def test_in_a_deployment_over_tls_whose_server_app_is_killed(tmp_path: Path) -> None:
    settings = {RUNS_DIR: str(tmp_path / "runs"), STATE_DIR: str(tmp_path / "clients")}
    with Deployment(tmp_path / "deployment", NODES, secure=True, settings=settings) as deployment:
        run = start(deployment, tmp_path, "run", str(APP), "--superlink", NAME, "--out", "out", *OPTIONS)
        wait_for_rounds(tmp_path / "out" / ARM / "rounds.jsonl", run)
        kill_when_it_runs(deployment, SUPERLINK, "flwr-serverapp")
        assert finish(run) == 1
        assert finish(start(deployment, tmp_path, "resume", "out")) == 0, (tmp_path / "said").read_text()[-3000:]
    (folder,) = tmp_path.glob(f"runs/out-*/{ARM}")
    check(folder)
