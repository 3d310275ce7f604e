"""A node's worker in a real deployment: what dies costs one reply, and nothing outlives its node."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.deployment import CONNECTED, Deployment, node_name
from benchmarks.processes import wait_until
from fedkit.calls import is_alive

APP = Path(__file__).parents[1] / "fixtures" / "warm_app"
NAMES = [node_name(0), node_name(1)]
ROUNDS, SLEEP = 4, {"do": "sleep", "seconds": 4.0}

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


def rounds(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pids(row: dict[str, Any]) -> dict[str, int]:
    """Return who served each node in a round, of those that replied."""
    return {node: report["pid"] for node, report in row.items() if isinstance(report, dict)}


def test_each_node_has_a_worker_whose_death_or_its_client_apps_costs_one_reply(tmp_path: Path) -> None:
    app = shutil.copytree(APP, tmp_path / "warm-app")
    (tmp_path / "do-3.json").write_text(json.dumps(SLEEP))  # time enough to kill somebody
    with Deployment(tmp_path / "deployment", nodes=len(NAMES)) as deployment:
        one, other = (re.findall(rf"{CONNECTED}(\d+)", deployment.text(name))[0] for name in NAMES)
        run = deployment.submit(app, {"num-clients": len(NAMES), "num-rounds": ROUNDS, "run-dir": str(tmp_path)})

        def wait_for_round(number: int) -> None:
            wait_until(lambda: len(rounds(tmp_path)) >= number or run.poll() is not None, f"no round {number}")
            assert len(rounds(tmp_path)) >= number, deployment.text("run")

        def wait_for_calls() -> None:
            """Wait until both nodes serve the next round."""
            calls = {name: deployment.count("error of call", name) for name in NAMES}
            wait_until(
                lambda: all(deployment.count("error of call", name) > calls[name] for name in NAMES), "idle"
            )

        wait_for_round(2)
        wait_for_calls()
        first, second = map(pids, rounds(tmp_path)[:2])
        assert first == second
        assert len(set(first.values())) == len(NAMES)
        os.kill(first[one], signal.SIGKILL)
        assert deployment.kill(NAMES[1], "flwr-clientapp") == 1
        wait_until(lambda: not any(map(is_alive, first.values())), "a worker went on for a ClientApp that died")
        wait_for_round(ROUNDS)
        run.wait()

        third, fourth = rounds(tmp_path)[2:]
        assert "was it killed" in third[one]
        assert not pids(third), "Flower answers for a ClientApp that died, after a minute"
        assert set(pids(fourth)) == {one, other}

        for name in NAMES:
            deployment.kill(name)
        wait_until(lambda: not any(map(is_alive, pids(fourth).values())), "a worker outlived its node")
