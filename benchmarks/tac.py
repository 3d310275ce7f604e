"""FL-TAC's table: ``python -m benchmarks.tac [--full] [--data glue cifar digits]``.

Several tasks are spread over ten clients by Dirichlet 0.5; ``examples/multitask`` trains, in one process, with
serialised messages. There is one adapter per task (LoRA of rank 1, and a head), with tasks found by clustering, or
told, or with each client's own; for comparison, FedIT's one adapter of rank 16 for all tasks, with one head, and
with a head per task.

``glue``    QNLI, QQP, SST-2, RTE and MRPC of ``$FEDKIT_DATA_DIR/text`` for MiniLM, adapters in its last block
``cifar``   CIFAR-10 and 50 classes of CIFAR-100, of ``$FEDKIT_DATA_DIR/cifar``: `benchmarks.tac_images`
``digits``  the example's own five questions about one set of images, with its own hyper-parameters

Accuracy is the mean over tasks, on held-out examples (GLUE: 300 of each, RTE 277), over the last 3 rounds;
*clustering* is the share of slots in the cluster of their task in the second half of the rounds. ``parameters``
are those of the largest upload, of the adapters of all tasks, as FL-TAC counts them; bytes are of frames, summed
over all rounds.

4 steps on few texts leave little to cluster: in the first round, the updates of one task are no more similar than
those of two (mean cosine −0.00 against −0.03; 41 % of the slots are in their task's cluster, with 20 steps 63 %).
Slots that began in a wrong cluster stay there, unless something else tells them apart
(`fedkit.aggregation.evidence`).
"""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

from flwr.app import Context, RecordDict

from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.flower import task_identity

APP = Path(__file__).parents[1] / "examples" / "multitask"
SETTINGS: dict[str, dict[str, Any]] = {
    "glue": {
        "examples": 300,
        "adapted-blocks": 1,
        "max-tokens": 48,
        "learning-rate": 0.01,
        "local-steps": 4,
        "batch-size": 16,
        "shared-r": 16,
        "test-rounds": 3,
    },
    "cifar": {
        "examples": 5000,
        "learning-rate": 0.01,
        "local-steps": 16,
        "batch-size": 16,
        "shared-r": 16,
        "test-rounds": 3,
    },
    "digits": {"shared-r": 16, "test-rounds": 3},
}
SMALL: dict[str, Any] = {"examples": 100, "local-steps": 1}
ROUNDS = {"glue": 6, "cifar": 10, "digits": 10}
ARMS: dict[str, dict[str, Any]] = {
    "TAC, rank 1 per task": {"strategy": "tac"},
    "TAC, by adapters alone": {"strategy": "tac", "strategy-options": "evidence='adapters'"},
    "TAC, by the updates of all rounds": {"strategy": "tac", "strategy-options": "evidence='updates'"},
    "FedIT, rank 16": {"strategy": "fedavg"},
    "oracle: told the tasks": {"strategy": "tac", "clustering": "oracle"},
    "FedIT, rank 16, a head per task": {"strategy": "fedavg", "heads": "per-task"},
    "FL-TAC as published": {"strategy": "tac", "clustering": "k-means"},
    "local only": {"strategy": "tac", "clustering": "local"},
    "TAC, 40 % of the replies lost": {"strategy": "tac", "drop": 0.4},
}
AUTHORS = "FL-TAC, the authors' code"
TASKS = {
    "glue": ("qnli", "qqp", "sst2", "rte", "mrpc"),
    "cifar": ("cifar10", "cifar100"),
    "digits": ("digit", "parity", "large", "prime", "round"),
}
COLUMNS = {"accuracy": "mean", "clustering": "clustering", "parameters": "parameters", "uplink": "uplink, kB"}


def measure(
    data: str, arm: Mapping[str, Any], seed: int, rounds: int, clients: int, settings: Mapping[str, Any]
) -> Row:
    """Return what a run of the example comes to."""
    sys.path.insert(0, str(APP))
    import torch
    from multitask import client_app, server_app, task

    from benchmarks import tac_images
    from fedkit.clients.adapters import get_adapter
    from fedkit.config import parse
    from tests.helpers.grid import InProcessGrid

    torch.set_num_threads(1)
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(task_identity(run_id=1, node_id=1))
        if data == "cifar":
            stack.enter_context(patch.object(task, "source", lambda config: tac_images))
        config = run_config(data, seed, rounds, clients, settings) | {"run-dir": folder} | dict(arm)
        grid = InProcessGrid([client_app.app] * clients)
        for context in grid.contexts.values():
            context.run_config = config
        server = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
        server_app.app(grid, server)
        rows = [json.loads(line) for line in Path(folder, "rounds.jsonl").read_text().splitlines()]
        parsed = parse(task.Config, config)
        values = sum(array.size for array in get_adapter(task.build_model(parsed)).values())
    return summary(rows) | {"parameters": values * (1 if parsed.shared else len(TASKS[data]))}


def measure_authors(
    clone: str, rate: float, seed: int, rounds: int, clients: int, settings: Mapping[str, Any]
) -> Row:
    """Return what a run of the authors' code on GLUE's tasks comes to."""
    sys.path.insert(0, str(APP))
    import torch
    from multitask import task

    from benchmarks.peers import fltac
    from fedkit.config import parse

    torch.set_num_threads(1)
    config = parse(task.Config, run_config("glue", seed, rounds, clients, settings))
    return fltac.measure(Path(clone), config, rate)


def run_config(data: str, seed: int, rounds: int, clients: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the example's run config."""
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    source = str(Path(os.environ["FEDKIT_DATA_DIR"]).resolve() / "text") if data == "glue" else "digits"
    run = {"seed": seed, "num-rounds": rounds, "num-clients": clients, "data": source}
    return {**defaults, **run, **settings}


def summary(rows: Sequence[Row]) -> Row:
    """Return the accuracies of the last rounds, the clustering of the second half, and the bytes."""
    tested = [row for row in rows if "accuracy" in row]
    found: Row = {key: mean(row[key] for row in tested) for key in tested[-1] if key.startswith("accuracy")}
    late = [row["cluster-accuracy"] for row in rows[len(rows) // 2 :] if "cluster-accuracy" in row]
    found |= {"clustering": mean(late), "clustering-least": min(late)} if late else {}
    return found | {"uplink": sum(row["uplink-frame-bytes"] for row in rows) / 1e3}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--data", nargs="+", choices=TASKS, default=["glue"], help="which tasks; GLUE's if unset"
    )
    arguments.add_argument("--seeds", type=int, nargs="+", help="instead of 0 1 2, or 0 without --full")
    arguments.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="instead of all")
    arguments.add_argument("--authors", metavar="DIR", help="a clone of the authors' code, another arm for GLUE")
    arguments.add_argument("--authors-rate", type=float, default=0.005, help="its learning rate (%(default)s)")
    options = arguments.parse_args(argv)
    if "FEDKIT_DATA_DIR" not in os.environ and options.data != ["digits"]:
        sys.exit(f"Set FEDKIT_DATA_DIR to a folder with text/TASK/*.jsonl.gz of {TASKS['glue']}, or cifar/*.npz.")
    logging.getLogger("fedkit").setLevel(logging.WARNING)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    bench = Bench("tac", options)
    seeds, clients = options.seeds or ([0, 1, 2] if bench.full else [0]), 10 if bench.full else 4
    code = sources_digest("fedkit/aggregation", "examples/multitask")
    for data in options.data:
        settings = SETTINGS[data] | ({} if bench.full else SMALL)
        rounds = ROUNDS[data] if bench.full else 3
        if data == "cifar":
            from benchmarks import tac_images

            tac_images.prepare(options.out, None if bench.full else 20)
        lines: dict[str, list[Row]] = {name: [] for name in options.arms}
        for seed in seeds:
            for name in options.arms:
                work = partial(measure, data, ARMS[name], seed, rounds, clients, settings)
                params = {"seed": seed, "rounds": rounds, "clients": clients, **settings, "code": code}
                params |= {"data": data} if data != "glue" else {}
                lines[name].append(bench.arm(name, work, **params))
            if options.authors and data == "glue":
                rate = options.authors_rate
                work = partial(measure_authors, options.authors, rate, seed, rounds, clients, settings)
                params = {"seed": seed, "rounds": rounds, "clients": clients, **settings, "learning-rate": rate}
                lines.setdefault(AUTHORS, []).append(bench.arm(AUTHORS, work, **params))
        columns = {"arm": "arm", **{f"accuracy-{name}": name for name in TASKS[data]}, **COLUMNS}
        bench.table(
            f"{data}: {', '.join(TASKS[data])}; {clients} clients, {rounds} rounds, {len(seeds)} seeds",
            columns,
            [average(name, rows, columns) for name, rows in lines.items()],
        )
    bench.finish()


def average(name: str, rows: Sequence[Row], columns: Mapping[str, str]) -> Row:
    """Return the means over the seeds."""
    return {"arm": name} | {
        key: mean(row[key] for row in rows) for key in columns if key in rows[0] and key != "arm"
    }


if __name__ == "__main__":
    main()
