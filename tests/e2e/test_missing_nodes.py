"""In a deployment that loses two nodes in every round, the run ends and learns, and says who stood in for whom."""

from __future__ import annotations

import random
import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from benchmarks.crashes import APP, finish, start
from benchmarks.deployment import NAME, Deployment, node_name
from fedkit.config import RUNS_DIR
from fedkit.report import read_rounds
from fedkit.state import STATE_DIR

NODES, OUT, ROUNDS = 4, 2, 12  # of the rounds, about two pass before anybody is killed
LIMITS = ["quorum=0.5", "grace=5.0", "deadline=20.0", "round-seconds=0.3"]
pytestmark = [pytest.mark.deployment, pytest.mark.slow]


class Killer:
    """Kills nodes at random, so that two are always out; each is started again, and refused for a minute."""

    def __init__(self, deployment: Deployment, pool: ThreadPoolExecutor) -> None:
        self.deployment, self.pool, self.rng = deployment, pool, random.Random(0)
        self.out: dict[int, Future[None]] = {}
        self.killed: list[str] = []

    def strike(self) -> None:
        """Kill as many as are lacking."""
        self.out = {i: future for i, future in self.out.items() if not future.done()}
        there = [i for i in range(NODES) if i not in self.out]
        for i in self.rng.sample(there, OUT - len(self.out)):
            self.deployment.cut_power(node_name(i))
            self.killed.append(str(i))
            self.out[i] = self.pool.submit(self.deployment.connect_node, i)


@pytest.mark.full
def test_two_nodes_are_out_in_each_of_ten_rounds(tmp_path: Path) -> None:
    """Nodes have keys: one that was killed stays out until its old session has lapsed."""
    folder, rng = tmp_path / "trial", random.Random(1)
    settings = {RUNS_DIR: str(folder / "runs"), STATE_DIR: str(folder / "clients")}
    options = ["--strategy", "safari", "--rounds", str(ROUNDS), "--run-config", f"num-clients={NODES}", *LIMITS]
    recorded, struck = folder / "out" / "safari-seed0" / "rounds.jsonl", 0
    with (
        Deployment(folder / "deployment", NODES, secure=True, settings=settings) as deployment,
        ThreadPoolExecutor(NODES) as pool,
    ):
        app, killer = shutil.copytree(APP, folder / "tiny-app"), Killer(deployment, pool)
        command = start(deployment, folder, "run", str(app), "--superlink", NAME, "--out", "out", *options)
        while command.poll() is None:
            rows = read_rounds(recorded)
            if rows and rows[-1]["round"] > max(struck, 1):  # the next one began
                struck = rows[-1]["round"]
                time.sleep(rng.uniform(0, 3))
                killer.strike()
            time.sleep(0.2)
        assert finish(command) == 0, (folder / "said").read_text()[-3000:]

    rows = read_rounds(recorded)
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1))
    assert rows[-1]["accuracy"] > 2 * rows[0]["accuracy"], "it learned"
    missing = {row["round"]: row["missing-clients"] for row in rows if "missing-clients" in row}
    named = {name for names in missing.values() for name in names}
    assert len(missing) >= 8
    assert named <= set(killer.killed), "of those that were killed alone"
    for row in rows[1:]:
        stand_ins = row.get("stand-ins", {})
        assert stand_ins.keys() <= set(row.get("missing-clients", []))
        absent = set(row.get("missing-clients", []))
        assert all(kin not in absent or kin == name for name, kin in stand_ins.items())
        assert not stand_ins or row["replies"] + row["late"] >= 1, "below the quorum the model stays"
    assert sum(len(row.get("stand-ins", {})) for row in rows) >= 5
    said = (folder / "said").read_text()
    assert "Missing clients" in said, "the report has a table of them"
