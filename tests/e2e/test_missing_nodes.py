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

NODES, ROUNDS = 4, 11  # of which the first is left alone
LIMITS = ["quorum=0.5", "grace=5.0", "deadline=20.0", "round-seconds=0.3"]
pytestmark = [pytest.mark.deployment, pytest.mark.slow]


def test_two_nodes_are_killed_in_each_of_ten_rounds(tmp_path: Path) -> None:
    """A killed node is started again, and refused until its old session has lapsed, a minute later."""
    folder, rng = tmp_path / "trial", random.Random(0)
    settings = {RUNS_DIR: str(folder / "runs"), STATE_DIR: str(folder / "clients")}
    options = ["--strategy", "safari", "--rounds", str(ROUNDS), "--run-config", f"num-clients={NODES}", *LIMITS]
    recorded, killed, struck = folder / "out" / "safari-seed0" / "rounds.jsonl", set(), 0
    with (
        Deployment(folder / "deployment", NODES, settings=settings) as deployment,
        ThreadPoolExecutor(NODES) as pool,
    ):
        app = shutil.copytree(APP, folder / "tiny-app")
        command = start(deployment, folder, "run", str(app), "--superlink", NAME, "--out", "out", *options)
        out: dict[int, Future[None]] = {}
        while command.poll() is None:
            if (
                done := len(read_rounds(recorded)) - 1
            ) > struck:  # a round was recorded, the next one is under way
                struck = done
                time.sleep(rng.uniform(0, 3))
                for i in rng.sample(range(NODES), 2):
                    if i not in out or out[i].done():
                        deployment.cut_power(node_name(i))
                        killed.add(str(i))
                        out[i] = pool.submit(deployment.connect_node, i)
            time.sleep(0.2)
        assert finish(command) == 0, (folder / "said").read_text()[-3000:]

    rows = read_rounds(recorded)
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1))
    assert rows[-1]["accuracy"] > 2 * rows[0]["accuracy"], "it learned"
    missing = {row["round"]: row["missing-clients"] for row in rows if "missing-clients" in row}
    named = {name for names in missing.values() for name in names}
    assert len(missing) >= 5
    assert named <= killed, "and of those that were killed alone"
    for row in rows[1:]:
        stand_ins = row.get("stand-ins", {})
        assert stand_ins.keys() <= set(row.get("missing-clients", []))
        absent = set(row.get("missing-clients", []))
        assert all(kin not in absent or kin == name for name, kin in stand_ins.items())
        assert not stand_ins or row["replies"] >= 2, "below the quorum the model stays"
    assert sum(len(row.get("stand-ins", {})) for row in rows) >= 5
    said = (folder / "said").read_text()
    assert "Missing clients" in said, "the report has a table of them"
