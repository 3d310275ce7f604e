"""The profile `mobile` compared with `cpu`, MiniLM LoRA on SST-2: ``python -m benchmarks.mobile [--full]``.

*A node*: the ClientApp of ``examples/text_lora`` trains its rounds (8 steps of 16 sentences) in a process of its
own, on one thread. Its peak of resident memory is the kernel's figure at its end (Linux). Its sentences are lines
of a file; in one arm they are read through `datasets`, as in the example.

*A federation*: 4 clients, uploads in float32; accuracy of the float32 model with the trained adapter on all 872
dev sentences, as the mean of the last 3 rounds. The arm `cpu` also takes 4 examples at once, so that dropout draws
the same in both and only int8 differs.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from types import SimpleNamespace
from typing import Any

import numpy as np

from benchmarks.harness import Bench, Row, parser, sources_digest
from benchmarks.machine import status_bytes

APP = Path(__file__).parents[1] / "examples" / "text_lora"
SETTINGS: dict[str, Any] = {"learning-rate": 1.5e-3, "local-steps": 8, "text-column": "text_a", "num-clients": 4}
NODES = {"cpu": ("cpu", "lines"), "mobile": ("mobile", "lines"), "mobile, `datasets`": ("mobile", "datasets")}
NODE_COLUMNS = {
    "arm": "a node",
    "peak": "peak MB",
    "imports": "MB after imports",
    "seconds": "s a round",
    "up": "kB up",
    "down": "kB down",
    "error": "error",
}
RUN_COLUMNS = {
    "arm": "a federation",
    "accuracy": "accuracy, by seed",
    "mean": "mean",
    "seconds": "s a client's round",
}
MINE = 8000  # sentences of a node
RUN_ROUNDS = 8  # of a federation


class Lines:
    """Sentences of one client, in memory: what `task.train` asks of a `datasets.Dataset`."""

    def __init__(self, folder: Path, client: int, num_clients: int) -> None:
        with gzip.open(folder / "train.jsonl.gz", "rt", encoding="utf-8") as file:
            mine = (line for number, line in enumerate(file) if number % num_clients == client)
            self.rows = [json.loads(line) for _, line in zip(range(MINE), mine, strict=False)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, indices: Sequence[int]) -> dict[str, list[Any]]:
        rows = [self.rows[int(i)] for i in indices]
        return {key: [row[key] for row in rows] for key in rows[0]}


def data() -> Path:
    """Return the folder of SST-2."""
    return Path(os.environ["FEDKIT_DATA_DIR"]).resolve() / "text" / "sst2"


def run_config(seed: int = 0, **more: Any) -> dict[str, Any]:
    """Return the example's run config for SST-2."""
    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    return {**defaults, **SETTINGS, "data": str(data()), "seed": seed, **more}


def be_a_node(profile: str, reads: str, rounds: int, steps: int) -> None:
    """Train some rounds in this process, with the example's own ClientApp, and print what they took."""
    sys.path.insert(0, str(APP))
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]  # of the extra `bench`; peft would import it
    from text_lora import client_app

    from benchmarks.federate import quiet
    from fedkit.flower import task_identity
    from fedkit.message import from_arrays
    from fedkit.rounds import RoundGrid
    from tests.helpers.grid import InProcessGrid

    if reads == "lines":  # in place of the module that imports `datasets`
        lines = SimpleNamespace(load_partition=lambda config, client: Lines(data(), client, config.num_clients))
        sys.modules["text_lora.data"] = lines  # type: ignore[assignment]
    from importlib import import_module

    from fedkit.clients.resident import MB, resident_bytes
    from fedkit.strategies import ErrorFeedback

    grid = InProcessGrid([client_app.app])
    (context,) = grid.contexts.values()
    context.node_config.update({"profile": profile, "threads": 1})
    context.run_config = run_config(**{"local-steps": steps})
    with np.load(os.environ["FEDKIT_ADAPTER"]) as file:
        initial = from_arrays(dict(file))
    import_module("fedkit.clients.adapters")  # torch, transformers and peft

    found, begin = {"imports": resident_bytes() / MB}, time.perf_counter()
    wrapped = RoundGrid(grid)
    strategy = ErrorFeedback(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    with quiet(), task_identity(run_id=1, node_id=1):
        strategy.start(wrapped, initial, rounds)
    totals = [wrapped.ledger.round_totals(k + 1) for k in range(rounds)]
    found |= {"seconds": (time.perf_counter() - begin) / rounds, "replies": sum(t["replies"] for t in totals)}
    found |= {"up": totals[-1]["uplink-bytes"] / 1e3, "down": totals[-1]["downlink-bytes"] / 1e3}
    print(json.dumps({"peak": status_bytes("VmHWM") / MB} | found))


def measure_node(profile: str, reads: str, rounds: int, steps: int, adapter: Path) -> Row:
    """Return what a node in a process of its own takes."""
    save_adapter(adapter)
    command = [sys.executable, "-m", "benchmarks.mobile", "--node", profile, reads, str(rounds), str(steps)]
    settings = {"FEDKIT_ADAPTER": str(adapter), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.run(
        command, env=os.environ | settings, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True
    )
    if process.returncode:
        raise RuntimeError(f"the node {profile!r} ended with {process.returncode}: {process.stdout}")
    found = json.loads(process.stdout.splitlines()[-1])
    error = None if found.pop("replies") == rounds else "did not answer every round"
    return {**found, "error": error}


def save_adapter(path: Path) -> None:
    """Write what a server would send, so that the node's process does not build it."""
    if not path.exists():
        sys.path.insert(0, str(APP))
        from text_lora import task
        from text_lora.model import build_model

        from fedkit.clients.adapters import get_adapter
        from fedkit.config import parse

        np.savez(path, **get_adapter(build_model(parse(task.Config, run_config()))))


def measure_run(profile_name: str, seed: int, rounds: int, steps: int) -> Row:
    """Return the accuracy, and the seconds of one client's round, of a federation of clients of one profile."""
    sys.path.insert(0, str(APP))
    import torch
    from text_lora import task
    from text_lora.data import load_partition, load_split
    from text_lora.model import build_model

    from benchmarks.federate import Federation, Reply, final, run
    from fedkit.arrays import NamedArrays
    from fedkit.clients.adapters import get_adapter, set_adapter
    from fedkit.clients.profiles import PROFILES
    from fedkit.config import parse
    from fedkit.strategies import Plain

    torch.set_num_threads(1)
    config = parse(task.Config, run_config(seed, **{"local-steps": steps}))
    profile = replace(PROFILES[profile_name], micro_batch=PROFILES["mobile"].micro_batch, memory=None, threads=1)
    whole, (_, dev) = build_model(config), load_split(config)
    model, seconds = profile.prepare(build_model(config)), []  # type: Any, list[float]
    parts = [load_partition(config, client) for client in range(config.num_clients)]

    def train(params: NamedArrays, client: int, server_round: int) -> Reply:
        begin = time.process_time()
        set_adapter(model, params)
        chance = task.local_seed(config, server_round, client)
        metrics = task.train(model, parts[client], config, seed=chance, profile=profile)
        seconds.append(time.process_time() - begin)
        return get_adapter(model), {"num-examples": len(parts[client]), **metrics}

    def accuracy(params: NamedArrays) -> float:
        set_adapter(whole, params)
        return float(task.evaluate(whole, dev, config)["accuracy"])

    federation = Federation(get_adapter(whole), config.num_clients, train, accuracy)
    found = run(federation, partial(Plain, downlink=None), rounds)
    return {"accuracy": final(found["accuracy"]), "rounds-accuracy": found["accuracy"], "seconds": mean(seconds)}


def compare(name: str, runs: Sequence[Row]) -> Row:
    """Return the line of one profile's federations: by seed, and means."""
    shown = "/".join(f"{row['accuracy']:.4f}" for row in runs)
    return {"arm": name, "accuracy": shown} | {
        key: mean(row[of] for row in runs) for key, of in {"mean": "accuracy", "seconds": "seconds"}.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument(
        "--node", nargs=4, metavar="…", help="be a node: profile, lines or datasets, rounds, steps"
    )
    arguments.add_argument("--seeds", type=int, nargs="+", help="instead of 0 1 2, or 0 without --full")
    arguments.add_argument("--profiles", nargs="+", default=["cpu", "mobile"], help="of federations (%(default)s)")
    options = arguments.parse_args(argv)
    if "FEDKIT_DATA_DIR" not in os.environ:
        sys.exit("Set FEDKIT_DATA_DIR to a folder that has text/sst2/train.jsonl.gz and dev.jsonl.gz.")
    if options.node:
        profile, reads, *numbers = options.node
        be_a_node(profile, reads, *map(int, numbers))
        return
    bench = Bench("mobile", options)
    rounds, steps = (3, 8) if bench.full else (1, 1)
    shared = {"rounds": rounds, "steps": steps, "code": sources_digest("clients", "examples/text_lora")}
    adapter = (bench.path.parent / "mobile-adapter.npz").resolve()
    arms = NODES if bench.full else {"mobile": NODES["mobile"]}
    rows = [bench.arm(a, partial(measure_node, *n, rounds, steps, adapter), **shared) for a, n in arms.items()]
    bench.table(f"One client's process, {rounds} rounds of {steps} steps, one thread", NODE_COLUMNS, rows)
    if bench.full:
        runs: dict[str, list[Row]] = {name: [] for name in options.profiles}
        for seed in options.seeds or [0, 1, 2]:
            for name in options.profiles:
                params = {"profile": name, "seed": seed, **SETTINGS, **shared, "rounds": RUN_ROUNDS}
                work = partial(measure_run, name, seed, RUN_ROUNDS, steps)
                runs[name].append(bench.arm(f"run, {name}", work, **params))
        lines = [compare(name, found) for name, found in runs.items()]
        bench.table(f"{RUN_ROUNDS} rounds of {steps} steps", RUN_COLUMNS, lines)
    bench.finish()


if __name__ == "__main__":
    main()
