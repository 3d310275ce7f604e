"""Missing clients, SAFARI compared with the alternatives: ``python -m benchmarks.safari [--full]``.

========  ============================================================================================
task      what is trained; ``--task`` chooses, all with ``--full``, otherwise the digits
========  ============================================================================================
`digits`  an MLP, 5 local epochs per round; at 60 % sparsity, and also with sparse models, as published
`cifar`   a CNN, 5 local steps per round; clients send all of their update, or a fifth
`sst2`    MiniLM's adapter, 8 local steps of Adam per round, as `benchmarks.text_lora`, 8 clients: LoRA of which a
          fifth of the entries is sent; RM-LoRA (4 of 8 rows, a penalty) with replies missing
========  ============================================================================================

Except for `sst2`, 20 clients are in two groups, each of which holds half of the classes
(`benchmarks.local_tasks`). Messages are real and serialised; replies are lost by a seeded schedule
(`fedkit.faults`), the same for all arms. Conditions: losses that are independent, or come in bursts of 5 rounds on
average, or hit one group ("biased": it loses 90 % of its replies, the other 10 %). Accuracy is the mean of the
last 10 rounds, or of the last quarter if that is less; bits are those of the frames, per parameter and upload.

Each run is one thread, and rows are saved as they finish. Several processes may share the work, each with other
``--seeds``, ``--conditions`` or ``--arms`` and a folder of its own; ``cat`` their rows into one, and run again to
see the table.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks import local_tasks, safari_plot, text_lora
from benchmarks.federate import Federation, run
from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.aggregation.missing import Missing
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.faults import Bursts, Faults
from fedkit.strategies import Safari

LAST = 10  # rounds whose accuracies are averaged, at most
PERFECT, DROP, REWEIGHT, MIFA, SAFARI = "perfect link", "drop", "reweight", "mifa", "safari"
KIN, MOVED, DISTANCES = "safari, kin alone", "safari, models that move on", "safari, distances"
ARMS: Mapping[str, Missing] = {
    PERFECT: Missing("drop"),
    SAFARI: Missing(),
    MIFA: Missing("mifa"),
    REWEIGHT: Missing("reweight"),
    DROP: Missing("drop"),
    KIN: Missing(own=False),
    MOVED: Missing(surrogate="update"),
    DISTANCES: Missing(similarity="l2", warmup_rounds=0),
}
MAIN = (PERFECT, SAFARI, MIFA, REWEIGHT, DROP)
LOST = (20, 40, 60, 80)  # per cent
NONE, BIASED = "none", "biased"
CONDITIONS = (NONE, *(f"{lost} %" for lost in LOST), "bursts, 40 %", "bursts, 80 %", BIASED)
COLUMNS = {"arm": "missing clients", "seeds": "seeds", "bits": "bits"}
BELOW, ABOVE, SLOWER, ARRIVED = 1.5, 8.0, 2.0, 0.9  # what counts as reproduced; points, points, times, accuracy


@dataclass(frozen=True)
class Task:
    """A federation, how long it is trained, and what of it clients send."""

    federation: Callable[[int], Federation]  # of a seed
    rounds: int
    density: float
    conditions: Sequence[str]
    options: Mapping[str, Any]  # of the strategy


SPARSE_MODELS = {"sparse_model": True, "rewire": 0.05, "anneal": True}
DRAWN = {"masks": "drawn", "quantizer": EntropyConstrained(0.5)}
RM_LORA = partial(text_lora.federation, **{"active-rank": 4, "orth-reg-weight": 0.1})
TASKS = {
    "digits": {
        "digits, 40 % dense": Task(local_tasks.digits, 100, 0.4, (NONE, "60 %", BIASED), {}),
        "digits, 40 % dense, sparse models": Task(
            local_tasks.digits, 100, 0.4, (NONE, "60 %", BIASED), SPARSE_MODELS
        ),
    },
    "cifar": {
        "CIFAR-10, whole updates": Task(local_tasks.cifar, 45, 1.0, CONDITIONS, {}),
        "CIFAR-10, 20 % dense": Task(local_tasks.cifar, 45, 0.2, CONDITIONS, {}),
        "CIFAR-10, 20 % dense, rewire 1": Task(local_tasks.cifar, 45, 0.2, (NONE,), {"rewire": 1.0}),
    },
    "sst2": {
        "SST-2, whole updates": Task(text_lora.federation, 16, 1.0, (NONE,), {}),
        "SST-2, 20 % dense": Task(text_lora.federation, 16, 0.2, (NONE,), {}),
        "SST-2, 20 % dense, drawn, quantized": Task(text_lora.federation, 16, 0.2, (NONE,), DRAWN),
        "SST-2, RM-LoRA": Task(RM_LORA, 16, 1.0, (NONE, "40 %"), {}),
    },
}


def faults(condition: str, seed: int) -> Faults | None:
    """Return what goes wrong under a condition; None: nothing. In the first two rounds nothing does."""
    if condition == NONE:
        return None
    common: dict[str, Any] = {"seed": seed, "start_round": 3}
    if condition == BIASED:
        return Faults(**common, groups={"[0-9]": 0.9, "1[0-9]": 0.1})
    share = float(condition.split()[-2]) / 100
    if condition.startswith("bursts"):  # bad for 5 rounds on average
        return Faults(**common, bursts=Bursts(begin=0.2 * share / (1 - share), end=0.2))
    return Faults(**common, drop=share)


def measure(task: Task, missing: Missing, condition: str, seed: int, rounds: int) -> Row:
    """Return one run."""
    make = partial(Safari, density=task.density, missing=missing, downlink=None, **task.options)
    row = run(task.federation(seed), make, rounds, faults=faults(condition, seed))
    row |= {"device": device()}
    row |= {key: row[key][-1] for key in ("uplink", "uplink-frame", "downlink", "downlink-frame", "published")}
    if condition == NONE:
        row["bits"] = 8 * row["uplink-frame"] / row["parameters"] / row["uploads"]
    last = row["accuracy"][-min(LAST, max(1, rounds // 4)) :]
    return row | {"final": mean(last), "worst": min(last)}


def arrived(row: Row) -> int | None:
    """Return the first round of three with 90 % on average; None: there is none."""
    accuracy = row["accuracy"]
    return next((k + 1 for k in range(len(accuracy) - 2) if mean(accuracy[k : k + 3]) >= ARRIVED), None)


def device() -> str:
    """Return what trains."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def measure_all(bench: Bench, name: str, task: Task, seeds: Sequence[int], rounds: int) -> list[Row]:
    """Return the rows of one task."""
    options = bench.options
    code = sources_digest("fedkit/aggregation", "fedkit/codec", "strategies", "clients")
    wanted = [c for c in task.conditions if c in (options.conditions or CONDITIONS)]
    rows = []
    for seed in seeds:
        for condition in wanted:
            for arm in options.arms or MAIN:
                if (arm == PERFECT) != (condition == NONE):
                    continue  # where nothing is lost all arms are the same
                params = {"task": name, "condition": condition, "seed": seed, "rounds": rounds, "code": code}
                work = partial(measure, task, ARMS[arm], condition, seed, rounds)
                rows.append(bench.arm(arm, work, **params))
    return rows


def table(rows: Sequence[Row]) -> list[Row]:
    """Return a line for each arm: its accuracy, in per cent, under each condition, and over how many seeds."""
    lines: dict[str, Row] = {}
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        lines[arm] = {"arm": arm, "seeds": len({row["seed"] for row in own})}
        if NONE in {row["condition"] for row in own}:
            lines[arm]["bits"] = mean(row["bits"] for row in own)
        for condition in dict.fromkeys(row["condition"] for row in own):
            lines[arm][condition] = 100 * mean(row["final"] for row in own if row["condition"] == condition)
    return list(lines.values())


def claims(rows: Sequence[Row]) -> list[Row]:
    """Return what counts as reproduced on the digits, by seed, and whether it holds."""
    found = []
    for seed in dict.fromkeys(row["seed"] for row in rows):
        by = {(r["arm"], r["condition"]): r for r in rows if r["seed"] == seed}
        perfect, dropped = by.get((PERFECT, NONE)), by.get((DROP, BIASED))
        for arm in (SAFARI, KIN):
            ours = by.get((arm, BIASED))
            if not (perfect and dropped and ours):
                continue
            below, above = 100 * (perfect["final"] - ours["final"]), 100 * (ours["final"] - dropped["final"])
            first, own = arrived(perfect), arrived(ours)
            late = own / first if own and first else float("inf")
            holds = (below <= BELOW, above >= ABOVE, late <= SLOWER)
            words = ", ".join("yes" if each else "no" for each in holds)
            found.append({"arm": arm, "seed": seed, "below": below, "above": above, "late": late, "holds": words})
    return found


CLAIMS = {
    "arm": "biased losses",
    "seed": "seed",
    "below": f"points below a perfect link (≤ {BELOW})",
    "above": f"above dropping (≥ {ABOVE:.0f})",
    "late": f"times the rounds to 90 % (≤ {SLOWER:.0f})",
    "holds": "reproduced",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--task", nargs="+", choices=TASKS, help="instead of all, or the digits without --full")
    arguments.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)}")
    arguments.add_argument("--conditions", nargs="+", choices=CONDITIONS, metavar="CONDITION")
    arguments.add_argument("--rounds", type=int, help="instead of each task's own")
    arguments.add_argument("--seeds", type=int, nargs="+", help="instead of 0 1 2, or 0 without --full")
    arguments.add_argument("--plot", metavar="FILE", help="write the picture")
    options = arguments.parse_args(argv)
    chosen = options.task or (list(TASKS) if options.full else ["digits"])
    if set(chosen) - {"digits"} and "FEDKIT_DATA_DIR" not in os.environ:
        sys.exit("Set FEDKIT_DATA_DIR to a folder that has cifar/cifar10_10k_2k.npz and text/sst2/*.jsonl.gz.")
    bench = Bench("safari", options)
    seeds = options.seeds or ([0, 1, 2] if bench.full else [0])
    for name, task in [item for key in chosen for item in TASKS[key].items()]:
        rounds = options.rounds or (task.rounds if bench.full else 8)
        rows = measure_all(bench, name, task, seeds, rounds)
        columns = COLUMNS | {condition: condition for condition in task.conditions}
        bench.table(f"{name}, {rounds} rounds: accuracy, %, by replies lost", columns, table(rows))
        if "digits" in name:
            bench.table("What counts as reproduced", CLAIMS, claims(rows))
    if options.plot:
        safari_plot.plot(bench.rows, Path(options.plot))
    bench.finish()


if __name__ == "__main__":
    main()
