"""RM-LoRA compared with LoRA on six tasks: ``python -m benchmarks.rm_lora [--full]``.

==========================  ===================================================================================
task                        what is trained, on 1,000 examples drawn anew for each seed
==========================  ===================================================================================
cola, mrpc, rte, sst2       the last two layers of MiniLM; tested on GLUE's dev set, MRPC on its test set
cifar100, cifar10           the last two blocks of a small vision transformer that has seen 50 other classes of
                            CIFAR-100 (`benchmarks.rm_lora_vit`); tested on the 50 unseen ones, and on CIFAR-10
==========================  ===================================================================================

Every arm uses the learning rate, out of three, that does best on the quarter of its training sets that was held
out for this, on average over three seeds that are not in the table. Test data are not used to choose anything. All
arms of a seed have the same examples and the same initial head, which is exempt from masks. ``alpha`` is 2 r.

Several processes may each run some of the tasks or arms, each into a folder of its own; ``--rows FILE ...`` shows
their rows together, and measures nothing.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from benchmarks.harness import Bench, Row, parser, sources_digest
from benchmarks.rm_lora_claims import BOTH, LORA4, LORA8, LORA16, MASK, PENALTY, claims, line

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.rm_lora_tasks import Examples, Task

ARMS: dict[str, dict[str, Any]] = {
    LORA4: {"r": 4, "active_rank": 4},
    LORA8: {"r": 8, "active_rank": 8},
    LORA16: {"r": 16, "active_rank": 16},
    PENALTY: {"r": 8, "active_rank": 8, "orth_reg_weight": 0.1},
    MASK: {"r": 8, "active_rank": 4},
    BOTH: {"r": 8, "active_rank": 4, "orth_reg_weight": 0.1},
    "RM-LoRA, independent": {"r": 8, "active_rank": 4, "orth_reg_weight": 0.1, "mask": "independent"},
    "RM-LoRA, strict": {"r": 8, "active_rank": 4, "orth_reg_weight": 0.1, "hold": "update"},
    "RM-LoRA, cosine": {"r": 8, "active_rank": 4, "orth_reg_weight": 0.1, "penalty": "cosine"},
}
NAMES = ("cola", "mrpc", "rte", "sst2", "cifar100", "cifar10")
METRIC = {"cola": "matthews"}  # what chooses the rate; elsewhere the accuracy
TUNING = (100, 101, 102)  # seeds
COLUMNS = {
    "arm": "arm",
    "seeds": "seeds",
    "rate": "rate",
    "parameters": "factors",
    "trained": "per step",
    "accuracy": "test, %",
    "matthews": "Matthews",
    "gap": "train − test",
    "rank": "effective rank",
    "budget": f"− {LORA4}, 95 %",
    "storage": f"− {LORA8}, 95 %",
}
CLAIMS = {"claim": "claim", "bound": "bound", "found": "found", "holds": "holds"}


@dataclass(frozen=True)
class Effort:
    """How much is done: all of it, or a quick look."""

    examples: int
    epochs: int
    rates: tuple[float, ...]
    pool: int
    test: int
    tuning: tuple[int, ...]
    steps: int | None  # of the vision transformer's training; all epochs if None


FULL = Effort(1000, 5, (3e-4, 1e-3, 3e-3), 3000, 2000, TUNING, None)
SMALL = Effort(32, 1, (1e-3,), 32, 32, (), 2)


@cache
def task_of(name: str, effort: Effort, device: str, folder: str) -> Task:
    """Return a task, made once."""
    from benchmarks.rm_lora_tasks import TASKS, Size

    return TASKS[name](Size(effort.pool, effort.test, effort.steps), device, folder)


def train(task: Task, arm: dict[str, Any], rate: float, seed: int, epochs: int, parts: dict[str, Any]) -> Row:
    """Return what training on ``parts["train"]`` gives on every part, each (examples, rows)."""
    from benchmarks.rm_lora_tasks import Shuffled
    from fedkit.clients.rm_lora import RMLoraConfig, lora_pairs, train_rm_lora

    wall, cpu = time.perf_counter(), time.process_time()
    config = RMLoraConfig(lora_alpha=2 * arm["r"], target_modules=task.targets, **arm)
    model = task.model(config.r, seed)
    device = str(task.pool.inputs["labels"].device)
    batches = Shuffled(*parts["train"])
    metrics = train_rm_lora(model, batches, config, learning_rate=rate, epochs=epochs, seed=seed)
    size = sum(p.numel() for _, *pair in lora_pairs(model) for p in pair)
    row = {"loss": metrics["train-loss"], "rank": metrics["effective-rank"], "parameters": size}
    row |= {"trained": size * config.active_rank // config.r, "device": device_name(device)}
    for name, (examples, rows) in parts.items():
        row |= {f"{name}-{key}": value for key, value in scores(model, examples, rows, task.num_labels).items()}
    row |= {"backbone": task.backbone} if task.backbone is not None else {}
    return row | {"seconds": time.perf_counter() - wall, "cpu-seconds": time.process_time() - cpu}


def device_name(device: str) -> str:
    """Return which processor it is."""
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def scores(model: Any, examples: Examples, rows: Tensor, num_labels: int) -> dict[str, float]:
    """Return the accuracy and, of two labels, Matthews correlation."""
    import torch
    from sklearn.metrics import accuracy_score, matthews_corrcoef

    model.eval()
    with torch.no_grad():
        found = torch.cat([model(**batch).logits.argmax(1) for batch in examples.batches(rows, 256)]).cpu()
    labels = examples.inputs["labels"].cpu()[rows]
    row = {"accuracy": float(accuracy_score(labels, found))}
    return row | ({"matthews": float(matthews_corrcoef(labels, found))} if num_labels == 2 else {})


def measure(task: Task, arm: dict[str, Any], rate: float, seed: int, effort: Effort, *, tune: bool) -> Row:
    """Return one run, tested on test data or, to tune, on a quarter of the training set that is held back."""
    import torch

    rows = task.draw(effort.examples, seed)
    if tune:
        held = len(rows) // 4
        parts = {"train": (task.pool, rows[held:]), "held": (task.pool, rows[:held])}
        return train(task, arm, rate, seed, effort.epochs, parts)
    parts = {"train": (task.pool, rows), "test": (task.test, torch.arange(len(task.test)))}
    row = train(task, arm, rate, seed, effort.epochs, parts)
    row |= {key.removeprefix("test-"): row[key] for key in list(row) if key.startswith("test-")}
    return row | {"gap": row["train-accuracy"] - row["accuracy"]}


def measure_arm(bench: Bench, name: str, arm: str, seeds: Sequence[int], effort: Effort) -> None:
    """Choose an arm's rate and measure it on every seed."""

    def run(part: str, rate: float, seed: int) -> Row:
        def found() -> Row:
            task = task_of(name, effort, bench.options.device, bench.options.cache)
            return measure(task, ARMS[arm], rate, seed, effort, tune=part == "tune")

        params = {"task": name, "part": part, "rate": rate, "seed": seed, **ARMS[arm], "code": code()}
        return bench.arm(arm, found, **params, examples=effort.examples, epochs=effort.epochs)

    key = f"held-{METRIC.get(name, 'accuracy')}"
    held = {rate: [run("tune", rate, seed)[key] for seed in effort.tuning] for rate in effort.rates}
    rate = max(effort.rates, key=lambda rate: mean(held[rate] or [0.0]))
    for seed in seeds:
        run("test", rate, seed)


@cache
def code() -> str:
    """Return the digest of the sources that train."""
    return sources_digest("clients")


def by_task(rows: Iterable[Row]) -> dict[str, dict[str, dict[int, Row]]]:
    """Return the rows of tests by task, arm and seed; tasks and arms in the order of this module."""
    found: dict[str, dict[str, dict[int, Row]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        if row["part"] == "test":
            found[row["task"]][row["arm"]][row["seed"]] = row
    return {
        task: {arm: dict(sorted(found[task][arm].items())) for arm in ARMS if arm in found[task]}
        for task in NAMES
        if task in found
    }


def show(bench: Bench, rows: Iterable[Row]) -> None:
    """Print a table for each task, a summary, and the claims."""
    found = by_task(rows)
    for task, arms in found.items():
        some = next(iter(next(iter(arms.values())).values()))
        title = f"{task}, {some['examples']} examples, {some['epochs']} epochs"
        if "backbone" in some:
            title += f"; the backbone knows {100 * some['backbone']:.1f} % of its own 50 classes' test images"
        columns = {key: name for key, name in COLUMNS.items() if key != "matthews" or "matthews" in some}
        bench.table(title, columns, [line(arm, arms) for arm in arms])
    summary: list[Row] = [{"arm": arm} for arm in ARMS]
    for row in summary:
        for task, arms in found.items():
            if row["arm"] in arms:
                row[task] = 100 * mean(one["accuracy"] for one in arms[row["arm"]].values())
        row["mean"] = mean(row[task] for task in found) if row.keys() > found.keys() else None
    bench.table("Test accuracy, %", {"arm": "arm", **{task: task for task in found}, "mean": "mean"}, summary)
    bench.table("What counts as reproduced", CLAIMS, claims(found))


def read(paths: Iterable[str]) -> list[Row]:
    """Return the rows of several files."""
    return [json.loads(text) for path in paths for text in Path(path).read_text().splitlines()]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    import torch

    arguments = parser(__doc__)
    arguments.add_argument("--task", nargs="+", choices=NAMES, help="instead of all, or of two without --full")
    arguments.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="instead of all")
    arguments.add_argument("--seeds", type=int, nargs="+", help="instead of 0 to 9, or 0 without --full")
    arguments.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments.add_argument("--cache", default="benchmark-runs", help="where the backbone is (%(default)s)")
    arguments.add_argument("--rows", nargs="+", metavar="FILE", help="show these, and measure nothing")
    options = arguments.parse_args(argv)
    bench = Bench("rm_lora", options)
    if options.rows:
        show(bench, read(options.rows))
        return
    if "FEDKIT_DATA_DIR" not in os.environ:
        sys.exit("Set FEDKIT_DATA_DIR to a folder that has text/{cola,mrpc,rte,sst2}/*.jsonl.gz and cifar/*.npz.")
    torch.set_num_threads(len(os.sched_getaffinity(0)) if bench.full and options.device == "cpu" else 1)
    effort = FULL if bench.full else SMALL
    seeds = options.seeds or (range(10) if bench.full else [0])
    for name in options.task or (NAMES if bench.full else ("sst2", "cifar10")):
        for arm in options.arms or ARMS:
            measure_arm(bench, name, arm, seeds, effort)
    show(bench, bench.rows)
    bench.finish()


if __name__ == "__main__":
    main()
