"""The READMEs' claims, and whether they still hold: ``python -m benchmarks.claims``.

A claim in `claims.toml` holds as long as none of its modules has changed since the commit at which it was
measured. After that, its small form must confirm it: a test that .ci/run runs, or a function of this file.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from fedkit.arrays import flatten, squared_norm, subtract
from fedkit.codec import Codec, EntropyConstrained, decode

ROOT = Path(__file__).parents[1]
HERE = "benchmarks.claims:"


@dataclass(frozen=True)
class Claim:
    """A figure of a README."""

    says: str  # in these words
    command: str  # that measures it
    commit: str  # that it was measured at
    modules: list[str]  # files and folders that it depends on
    small: str  # a test, or a function here
    rows: str = ""  # its file in benchmarks/results
    value: float = 0.0  # that the function returned at that commit
    tolerance: float = 0.0  # share of it by which it may differ
    timed: bool = False  # a time, which no test asserts

    @property
    def changed(self) -> bool:
        """Whether a module has changed since, or nobody can tell, without git or its history."""
        command = ["git", "-C", str(ROOT), "diff", "--quiet", self.commit, "--", *self.modules]
        return subprocess.run(command, capture_output=True, check=False).returncode != 0

    @property
    def function(self) -> Callable[[], float] | None:
        """The function that is its small form; None if that is a test."""
        name = self.small.removeprefix(HERE)
        return None if name == self.small else globals()[name]  # type: ignore[no-any-return]

    def agrees(self) -> tuple[bool, float]:
        """Return whether the function's number is within the tolerance, and the number."""
        found = self.function() if self.function else self.value
        return abs(found - self.value) <= self.tolerance * abs(self.value), found


def claims() -> list[Claim]:
    """Return all claims."""
    return [Claim(**each) for each in tomllib.loads((ROOT / "benchmarks" / "claims.toml").read_text())["claim"]]


@cache
def error_at_half_a_bit() -> float:
    """Return the squared error of half a bit per value, as a share of the squared norm."""
    return _error(0.5)


@cache
def error_at_one_bit() -> float:
    """Return the squared error of one bit per value, as a share of the squared norm."""
    return _error(1.0)


@cache
def times_faster_than_fedavg() -> float:
    """Return how many times faster than Flower's FedAvg 30 uploads of 1 bit are averaged."""
    from benchmarks.aggregate import FEDAVG, measure
    from fedkit.flower import task_identity

    with task_identity(run_id=1, node_id=1):
        rows = {row["arm"]: row for row in measure(30, 3, False)}
    (name,) = [arm for arm in rows if "ErrorFeedback, 1 bit" in arm]
    return float(rows[FEDAVG]["seconds"] / rows[name]["seconds"])


@cache
def rank_of_rm_lora() -> float:
    """Return RM-LoRA's effective rank as a share of LoRA's, both of r 8, after three epochs on 300 digits."""
    from benchmarks.mixed_ranks import Task

    task = Task("digits", seed=0, rate=0.005)
    plain, ranks = replace(task.config(8), local_epochs=3), []
    images, labels, *_ = task.module.load_split()
    for config in (plain, replace(plain, active_rank=4, orth_reg_weight=0.1)):
        model = task.module.build_model(config)
        metrics = task.module.train(model, images[:300], labels[:300], config, seed=0)
        ranks.append(metrics["effective-rank"])
    return float(ranks[1] / ranks[0])


@cache
def accuracy_of_product_changes() -> float:
    """Return the accuracy of two rounds of ranks 4, 8 and 16, changes of products averaged."""
    from benchmarks.federate import quiet
    from benchmarks.mixed_ranks import ARMS, Task, run
    from fedkit.flower import task_identity

    make, ranks = ARMS["product of updates"]
    with quiet(), task_identity(run_id=1, node_id=1):
        return float(run(Task("digits", seed=0, rate=0.01), make, ranks, 2, frozen=False)["accuracy"][-1])


@cache
def share_of_fedavgs_objects() -> float:
    """Return Flower objects of a reply of 34 arrays, each of which costs a call, as a share of FedAvg's."""
    from flwr.app import Message, MetricRecord, RecordDict

    from fedkit.flower import deflate, task_identity
    from fedkit.memory import GENESIS
    from fedkit.message import Report, frame_record, from_arrays, write_report

    rng = np.random.default_rng(0)  # equal objects would be one
    arrays = {f"layer{i}": rng.normal(size=(8, 96)).astype(np.float32) for i in range(34)}
    counts = []
    with task_identity(run_id=1, node_id=1):
        for record in (frame_record(Codec(EntropyConstrained(1.0)).encode(arrays)), from_arrays(arrays)):
            content = RecordDict({"arrays": record, "metrics": MetricRecord({"num-examples": 10})})
            if not counts:
                write_report(content, Report("0", GENESIS, False, GENESIS, {}))
            counts.append(len(deflate(Message(content, dst_node_id=1, message_type="train"))[1]))
    return counts[0] / counts[1]


def _error(rate: float) -> float:
    """Return the error of frames of Laplace values whose scale differs from array to array."""
    rng = np.random.default_rng(0)
    scales = {"a": 1.0, "b": 0.3, "c": 0.1}
    update = {name: rng.laplace(0, scale, 20_000).astype(np.float32) for name, scale in scales.items()}
    frame = Codec(EntropyConstrained(rate)).encode(update, rng=rng)
    if not 0.97 < 8 * len(frame) / (rate * flatten(update).size) < 1.03:
        raise ValueError(f"{len(frame)} bytes are not {rate} bits per value.")
    return squared_norm(subtract(update, decode(frame, like=update))) / squared_norm(update)


def main() -> int:
    """List the claims; run the functions of those whose modules changed; return how many disagree."""
    disagree = 0
    table = Table("claim", "measured at", "modules", "small form")
    for claim in claims():
        state, small = "as then", claim.small.partition("::")[2] or claim.small
        if claim.changed:
            state = "changed"
            if claim.function:
                holds, found = claim.agrees()
                disagree += not holds
                then = f"{claim.value} ± {claim.tolerance:.0%}"
                small = f"{'agrees' if holds else 'DISAGREES'}: {found:.4g}, then {then}"
        table.add_row(claim.command, claim.commit, state, small)
    Console().print(table)
    return disagree


if __name__ == "__main__":
    sys.exit(main())
