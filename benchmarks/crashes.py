"""A deployment whose processes are killed at random moments: ``python -m benchmarks.crashes [--full]``.

Each trial has a SuperLink with a database, four SuperNodes that keep their memory on disk, and one run. The
trial's seed decides which is killed with SIGKILL: a SuperNode's machine, a ClientApp, the ServerApp or the
SuperLink's machine. Whatever systemd or Docker would restart is restarted. The run must end with a model, by
itself or after `fedkit resume`, and the logs must say what happened.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.deployment import NAME, SUPERLINK, Deployment, node_name
from benchmarks.harness import Bench, Row, parser, sources_digest
from benchmarks.processes import wait_until
from fedkit.config import RUNS_DIR
from fedkit.processes import program
from fedkit.report import Row as Round
from fedkit.report import read_rounds
from fedkit.state import STATE_DIR

APP = Path(__file__).parents[1] / "tests" / "fixtures" / "tiny_app"
VICTIMS: Final = ("SuperNode", "ClientApp", "ServerApp", "SuperLink")
NODES, ROUNDS, SECONDS, RESUMPTIONS = 4, 8, 400.0, 3
ARM = "aquila-seed0"
OPTIONS = ["--strategy", "aquila", "--rounds", str(ROUNDS), "--run-config", f"num-clients={NODES}"]
LIMITS = ["quorum=0.5", "grace=5.0", "deadline=30.0", "round-seconds=0.3"]
COLUMNS = {
    "trial": "trial",
    "victim": "victim",
    "round": "after round",
    "resumed": "resumed",
    "accuracy": "accuracy",
    "lost": "replies missing",
    "seconds": "seconds",
}


@dataclass(frozen=True)
class Trial:
    """What became of one run."""

    victim: str
    server_round: int  # the last one that was recorded before the kill
    resumed: int  # how often `fedkit resume` was needed
    seconds: float
    rounds: Sequence[Round]
    model: Path  # what the server saved in the end
    said: str  # by `fedkit`, all times, and in the log of the run


def trial(folder: Path, seed: int) -> Trial:
    """Return what became of a run, some part of which was killed; `folder` must not exist.

    Raises
    ------
    TimeoutError
        If it does not end in time.
    """
    rng = random.Random(f"crash {seed}")
    victim, node, after = VICTIMS[seed % len(VICTIMS)], rng.randrange(NODES), rng.randint(1, ROUNDS - 2)
    settings = {RUNS_DIR: str(folder / "runs"), STATE_DIR: str(folder / "clients")}
    began = time.monotonic()
    with Deployment(folder / "deployment", NODES, database=True, settings=settings) as deployment:
        app = shutil.copytree(APP, folder / "tiny-app")
        command = start(
            deployment, folder, "run", str(app), "--superlink", NAME, "--out", "out", *OPTIONS, *LIMITS
        )
        recorded = folder / "out" / ARM / "rounds.jsonl"
        problem = f"round {after} was not recorded. Logs: {folder}"
        wait_until(lambda: len(read_rounds(recorded)) > after or command.poll() is not None, problem)
        time.sleep(rng.uniform(0, 5))
        server_round = len(read_rounds(recorded)) - 1
        strike(deployment, victim, node)
        resumed = 0
        while finish(command) != 0:
            if (resumed := resumed + 1) > RESUMPTIONS:
                raise TimeoutError(f"the run did not end in spite of {RESUMPTIONS} resumptions. Logs: {folder}")
            command = start(deployment, folder, "resume", "out")
    said = (folder / "said").read_text() + "".join(log.read_text() for log in folder.glob("out/*/flower*.log"))
    (model,) = folder.glob(f"runs/out-*/{ARM}/model.npz")
    return Trial(victim, server_round, resumed, time.monotonic() - began, read_rounds(recorded), model, said)


def strike(deployment: Deployment, victim: str, node: int) -> None:
    """Kill one part of a deployment, and start again what a supervisor would."""
    if victim == "SuperNode":
        deployment.cut_power(node_name(node))
        deployment.connect_node(node)
    elif victim == "ClientApp":
        kill_when_it_runs(deployment, node_name(node), "flwr-clientapp")
    elif victim == "ServerApp":
        kill_when_it_runs(deployment, SUPERLINK, "flwr-serverapp")
    else:
        deployment.cut_power(SUPERLINK)
        deployment.start_superlink()


def kill_when_it_runs(deployment: Deployment, name: str, command: str) -> None:
    """Kill a program on a machine, now or as soon as it runs."""
    wait_until(lambda: deployment.kill(name, command) > 0, f"{command} did not run on {name}.", pause=0.05)


def start(deployment: Deployment, folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start a `fedkit` command in the folder; what it says is added to the file ``said``."""
    with (folder / "said").open("ab") as file:
        return subprocess.Popen(
            [program("fedkit"), *arguments], env=deployment.environment, cwd=folder, stdout=file, stderr=file
        )


def finish(command: subprocess.Popen[bytes]) -> int:
    """Return the exit code of a command; raise TimeoutError if it does not end."""
    with command:
        with suppress(subprocess.TimeoutExpired):
            return command.wait(SECONDS)
        command.kill()
    raise TimeoutError(f"a run did not end within {SECONDS:.0f} s.")


def measure(seed: int) -> Row:
    """Return a trial as a row."""
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        found = trial(Path(name, "trial"), seed)
    return {
        "trial": seed,
        "victim": found.victim,
        "round": found.server_round,
        "resumed": found.resumed,
        "accuracy": found.rounds[-1]["accuracy"],
        "lost": sum(row["missing"] for row in found.rounds),
        "seconds": found.seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run the trials and print what became of them."""
    bench = Bench("crashes", parser(__doc__).parse_args(arguments))
    count = 20 if bench.full else len(VICTIMS)
    for seed in range(count):
        bench.arm(
            f"trial {seed}", partial(measure, seed), sources=sources_digest("fedkit", "strategies", "clients")
        )
    bench.table(f"{count} runs, each of which lost a process", COLUMNS, bench.rows)
    bench.finish()


if __name__ == "__main__":
    sys.exit(main())
