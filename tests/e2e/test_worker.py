"""A node's worker in a real deployment: what dies costs one reply, and nothing outlives its node."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from benchmarks.deployment import Deployment, node_name
from benchmarks.processes import wait_until
from fedkit.calls import is_alive

APP = Path(__file__).parents[1] / "fixtures" / "warm_app"
NODES, SLEEP = 2, {"do": "sleep", "seconds": 4.0}

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


def rounds(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rounds.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pids(row: dict[str, Any]) -> dict[str, int]:
    """Return who served each node in a round, of those that replied."""
    return {node: report["pid"] for node, report in row.items() if isinstance(report, dict)}


def test_one_worker_serves_each_node_and_a_death_costs_one_reply(tmp_path: Path) -> None:
    app = shutil.copytree(APP, tmp_path / "warm-app")
    for number in (3, 5):  # time enough to kill somebody
        (tmp_path / f"do-{number}.json").write_text(json.dumps(SLEEP))
    (tmp_path / "do-7.json").write_text(json.dumps({"do": "raise"}))
    with Deployment(tmp_path / "deployment", nodes=NODES) as deployment:
        run = deployment.submit(app, {"num-clients": NODES, "num-rounds": 8, "run-dir": str(tmp_path)})

        def reached(number: int) -> bool:
            assert run.poll() is None or len(rounds(tmp_path)) == 8, deployment.text("run")
            return len(rounds(tmp_path)) >= number

        def sleeps(name: str) -> bool:
            return deployment.count("error of call", name) > before[name]

        wait_until(lambda: reached(2), "no two rounds")
        first, second = map(pids, rounds(tmp_path))
        assert first == second
        assert len(set(first.values())) == NODES
        before = {node_name(i): deployment.count("error of call", node_name(i)) for i in range(NODES)}
        wait_until(lambda: all(map(sleeps, before)), "no call of round 3")
        os.kill(victim := first[min(first)], signal.SIGKILL)
        wait_until(lambda: reached(4), "no round after the worker's death")
        third, fourth = rounds(tmp_path)[2:4]
        assert "was it killed" in third[min(first)]
        assert pids(third) == {node: pid for node, pid in first.items() if pid != victim}
        assert len(pids(fourth)) == NODES
        assert victim not in pids(fourth).values()

        before = {node_name(i): deployment.count("error of call", node_name(i)) for i in range(NODES)}
        wait_until(lambda: all(map(sleeps, before)), "no call of round 5")
        assert deployment.kill(node_name(0), "flwr-clientapp") == 1
        wait_until(lambda: reached(6), "no round after the ClientApp's death")
        fifth, sixth = rounds(tmp_path)[4:6]
        assert len(pids(fifth)) == NODES - 1
        assert len(pids(sixth)) == NODES
        assert len(set(pids(sixth).values()) - set(pids(fourth).values())) == 1, "its work was given up"

        wait_until(lambda: reached(8), "no last round")
        seventh, eighth = rounds(tmp_path)[6:]
        assert [text for text in seventh.values() if "as it was told" in str(text)]
        assert pids(eighth) == pids(sixth)
        run.wait()

        for i in range(NODES):
            deployment.kill(node_name(i))
        wait_until(lambda: not any(map(is_alive, pids(eighth).values())), "a worker outlived its node")
