"""Bits to equal accuracy, AQUILA and the schemes of its comparison: ``python -m benchmarks.aquila [--full]``.

========  ============================================================================================
task      what is trained; ``--task`` chooses, all with ``--full``, otherwise the digits
========  ============================================================================================
`digits`  an MLP, one step of SGD per round with all of a client's examples or 32 of them; the target is 95 %
`cifar`   a CNN, one step of SGD per round; the target is FedAvg's final accuracy minus a point
`sst2`    MiniLM's LoRA adapter, 8 local steps of Adam per round, as `benchmarks.text_lora`
========  ============================================================================================

Messages are real and serialised. An arm has reached the target when the mean of 3 successive accuracies has. Bytes
are those of the frames as sent; also shown are those of all of Flower's objects, and those that a paper would
count for the same uploads: packed levels, and 40 bits for each group's scale and width. The downlink of the
published schemes is dense. LENA, which the paper also compares with, is left out, since we know its rule only
roughly.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any

from flwr.serverapp.strategy import FedAvg

from benchmarks import gradient_tasks, text_lora
from benchmarks.aquila_claims import (
    ADAQUANT,
    AQUILA,
    FEDAVG,
    LAQ,
    LITERAL,
    MARINA,
    QSGD,
    TWO_BITS,
    ZERO,
    claims,
    saving,
)
from benchmarks.federate import Federation, arrival, final, run
from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.codec.baselines import Qsgd
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.strategies import Aquila, Marina, Plain
from fedkit.submodels import width

Make = Callable[..., FedAvg]
UNTIL = {
    "arm": "until the target",
    "rounds": "rounds",
    "up": "uplink MB",
    "up-all": "all objects",
    "up-paper": "as papers count",
    "down": "downlink MB",
    "saving": "fewer than baselines, %",
    "saving-paper": "as papers count",
}
END = {
    "arm": "in the end",
    "final": "accuracy",
    "total": "uplink MB",
    "total-paper": "as papers count",
    "skips": "skips, %",
    "bits": "bits per parameter sent",
    "bits-paper": "as papers count",
}
CLAIMS = {
    "claim": "claim",
    "bound": "bound",
    "accuracy": "points beside FedAvg",
    "paper": "as papers count",
    "paper-holds": "reproduced",
    "frames": "frames",
    "frames-holds": "reproduced",
}


@dataclass(frozen=True)
class Task:
    """A federation, and how long it is trained."""

    federation: Callable[[int], Federation]  # of a seed
    beta: float  # of AQUILA
    rounds: int
    small: int  # rounds without --full
    every: int  # rounds between two accuracies; fewer in a short run
    margin: float  # how far below FedAvg's accuracy the target is, or
    fixed: float | None = None  # the target
    two_sizes: bool = False  # whether half of the clients hold the sub-model of half the width
    longer: int = 1  # times the rounds that all arms but FedAvg have to arrive; those of more than 1 end there

    def target(self, baseline: Row) -> float:
        """Return the accuracy to arrive at."""
        return final(baseline["accuracy"]) - self.margin if self.fixed is None else self.fixed


TASKS = {
    "digits": {
        "digits, all examples": Task(partial(gradient_tasks.digits, batch=None), 0.5, 600, 12, 5, 0.0, 0.95),
        "digits, batches of 32": Task(partial(gradient_tasks.digits, batch=32), 0.5, 600, 12, 5, 0.0, 0.95),
    },
    "cifar": {
        "CIFAR-10, IID": Task(partial(gradient_tasks.cifar, dirichlet_alpha=100), 0.1, 300, 6, 10, 0.01),
        "CIFAR-10, Dirichlet 0.1": Task(partial(gradient_tasks.cifar, dirichlet_alpha=0.1), 0.1, 300, 6, 10, 0.01),
        "CIFAR-10, IID, two sizes": Task(
            partial(gradient_tasks.cifar, dirichlet_alpha=100, two_sizes=True),
            0.1,
            300,
            6,
            10,
            0.01,
            two_sizes=True,
        ),
        "CIFAR-10, Dirichlet 0.1, two sizes": Task(
            partial(gradient_tasks.cifar, dirichlet_alpha=0.1, two_sizes=True),
            0.1,
            300,
            6,
            10,
            0.01,
            two_sizes=True,
        ),
    },
    "sst2": {"SST-2, MiniLM LoRA": Task(text_lora.federation, 0.05, 16, 3, 1, text_lora.MARGIN, longer=2)},
}


def arms(beta: float, *, two_sizes: bool = False) -> dict[str, Make]:
    """Return the strategies by name; of two sizes without LAQ, whose rule is for one, and FedAvg is HeteroFL."""
    dense = {"weighted": False, "downlink": None}
    table: dict[str, Make] = {
        FEDAVG: FedAvg,
        LITERAL: partial(Aquila.published, beta=beta),
        TWO_BITS: partial(Aquila, beta=beta, quantizer=AquilaMidTread(min_bits=2), **dense),
        ZERO: partial(Aquila, beta=beta, quantizer=ZeroMidTread(), **dense),
        AQUILA: Aquila,
        QSGD: partial(Plain.qsgd, bits=5),  # 4 and the sign
        ADAQUANT: Plain.adaquantfl,
        LAQ: Aquila.laq,
        MARINA: partial(Marina, quantizer=Qsgd(5)),
    }
    if not two_sizes:
        return table
    table |= {FEDAVG: partial(Plain, **dense), AQUILA: partial(Aquila, downlink=None)}
    submodels = {gradient_tasks.HALF: width(0.5)}
    return {name: partial(make, submodels=submodels) for name, make in table.items() if name != LAQ}


def measure(task: Task, make: Make, seed: int, num_rounds: int, target: float | None) -> Row:
    """Return one run."""
    return run(
        task.federation(seed), make, num_rounds, every=max(1, min(task.every, num_rounds // 3)), target=target
    )


def compare(name: str, rows: Sequence[Row], targets: Sequence[float]) -> Row:
    """Return the line of one arm: means over the seeds, in MB; none until the target if a seed did not arrive."""
    ends = [arrival(row["accuracy"], target) for row, target in zip(rows, targets, strict=True)]
    rounds = ["–" if end is None else str(end * row["every"]) for end, row in zip(ends, rows, strict=True)]
    line: dict[str, Any] = {
        "arm": name,
        "rounds": "/".join(rounds),
        "final": mean(final(row["accuracy"]) for row in rows),
        "skips": 100 * mean(1 - row["uploads"] / row["asked"] for row in rows),
    }
    for key, way in {"": "uplink-frame", "-paper": "published"}.items():
        line[f"total{key}"] = mean(row[way][-1] for row in rows) / 1e6
        line[f"bits{key}"] = mean(8 * row[way][-1] / row["parameters"] / max(row["uploads"], 1) for row in rows)
    ways = {"up": "uplink-frame", "up-all": "uplink", "up-paper": "published", "down": "downlink-frame"}
    for key, way in {} if None in ends else ways.items():
        line[key] = mean(row[way][end - 1] for row, end in zip(rows, ends, strict=True) if end) / 1e6
    return line


def measure_all(bench: Bench, name: str, task: Task, seeds: Sequence[int], rounds: int) -> dict[str, Row]:
    """Return the lines of one task, by arm."""
    code = sources_digest("fedkit", "strategies", "clients")
    table = arms(task.beta, two_sizes=task.two_sizes)
    table = {arm: make for arm, make in table.items() if arm in {FEDAVG, *(bench.options.arms or [arm])}}
    found: dict[str, list[Row]] = {arm: [] for arm in table}
    targets = []
    for seed in seeds:
        params: dict[str, Any] = {"task": name, "seed": seed, "rounds": rounds}
        for arm, make in table.items():
            if arm == FEDAVG:
                row = bench.arm(arm, partial(measure, task, make, seed, rounds, None), **params)
                targets.append(task.target(row))
            else:
                stop = targets[-1] if task.longer > 1 else None
                ours = partial(measure, task, make, seed, task.longer * rounds, stop)
                row = bench.arm(arm, ours, **params, beta=task.beta, code=code)
            found[arm].append(row)
    lines = {arm: compare(arm, rows, targets) for arm, rows in found.items()}
    for line in lines.values():
        line |= {"saving": saving(line, lines, "up"), "saving-paper": saving(line, lines, "up-paper")}
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--task", nargs="+", choices=TASKS, help="instead of all, or the digits without --full")
    arguments.add_argument(
        "--arms", nargs="+", choices=arms(0.0), metavar="ARM", help="instead of all, besides FedAvg"
    )
    arguments.add_argument("--rounds", type=int, help="instead of each task's own")
    arguments.add_argument("--seeds", type=int, nargs="+", help="instead of 0 1 2, or 0 without --full")
    options = arguments.parse_args(argv)
    chosen = options.task or (list(TASKS) if options.full else ["digits"])
    if set(chosen) - {"digits"} and "FEDKIT_DATA_DIR" not in os.environ:
        sys.exit("Set FEDKIT_DATA_DIR to a folder that has cifar/cifar10_10k_2k.npz and text/sst2/*.jsonl.gz.")
    bench = Bench("aquila", options)
    seeds = options.seeds or ([0, 1, 2] if bench.full else [0])
    lines: dict[str, Mapping[str, Row]] = {}
    for name, task in [item for key in chosen for item in TASKS[key].items()]:
        rounds = options.rounds or (task.rounds if bench.full else task.small)
        lines[name] = measure_all(bench, name, task, seeds, rounds)
        title = f"{name}, {rounds} rounds, seeds {' '.join(map(str, seeds))}"
        for columns in (UNTIL, END):
            bench.table(title, columns, list(lines[name].values()))
    bench.table("What counts as reproduced", CLAIMS, claims(lines))
    bench.finish()


if __name__ == "__main__":
    main()
