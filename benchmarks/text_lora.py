"""Bytes to FedAvg's accuracy: ``python -m benchmarks.text_lora [--full]``.

The task of ``examples/text_lora`` on SST-2, from the folder ``$FEDKIT_DATA_DIR/text/sst2``: MiniLM with LoRA (r 8,
query and value), 8 clients, all 872 dev sentences. Messages are real and serialised; bytes are all of Flower's
objects, uplink and downlink. An arm has reached the target, and stops, when the mean of 3 successive rounds
reaches that of FedAvg's last 3 minus half a point; it has twice as many rounds for that. FedAvg's own bytes are
also counted up to that point.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from flwr.serverapp.strategy import FedAvg

from benchmarks.federate import Federation, Reply, arrival, final, run
from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.arrays import NamedArrays
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.wire import Codec
from fedkit.config import parse
from fedkit.strategies import ErrorFeedback

APP = Path(__file__).parents[1] / "examples" / "text_lora"
PLAIN = {"active-rank": 8, "orth-reg-weight": 0.0}  # LoRA, not RM-LoRA
SETTINGS = {"learning-rate": 1.5e-3, "local-steps": 8, "text-column": "text_a"}
FEDAVG, MARGIN = "FedAvg", 0.005
COLUMNS = {
    "arm": "arm",
    "final": "accuracy, last 3 rounds",
    "rounds": "rounds until FedAvg − 0.5",
    "up": "uplink kB until then",
    "down": "downlink kB until then",
    "times-up": "uplink, times fewer",
    "times": "in all, times fewer",
}


def rates(up: float, down: float) -> Callable[..., FedAvg]:
    """Return error feedback at so many bits per parameter; the initial arrays take 4."""
    return partial(
        ErrorFeedback,
        quantizer=EntropyConstrained(up),
        downlink=Codec(EntropyConstrained(down)),
        initial=Codec(EntropyConstrained(4.0)),
    )


ARMS = {f"error feedback, {up} bits up, {down} down": rates(up, down) for up, down in [(0.5, 1.0)]}


def federation(seed: int, **changed: Any) -> Federation:
    """Return the example's task on SST-2, with a model that is loaded once; by CUDA where there is one.

    `changed` are settings of the example, in kebab-case.
    """
    import torch

    sys.path.insert(0, str(APP))
    from text_lora import task
    from text_lora.data import load_partition, load_split
    from text_lora.model import build_model

    from fedkit.clients.adapters import get_adapter, set_adapter

    defaults = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    data = str(Path(os.environ["FEDKIT_DATA_DIR"]).resolve() / "text" / "sst2")
    config = parse(task.Config, defaults | PLAIN | SETTINGS | changed | {"data": data, "seed": seed})
    model, (_, dev) = build_model(config), load_split(config)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    parts = [load_partition(config, client) for client in range(config.num_clients)]

    def train(params: NamedArrays, client: int, server_round: int) -> Reply:
        set_adapter(model, params)
        metrics = task.train(model, parts[client], config, seed=task.local_seed(config, server_round, client))
        return get_adapter(model), {"num-examples": len(parts[client]), **metrics}

    def accuracy(params: NamedArrays) -> float:
        set_adapter(model, params)
        return float(task.evaluate(model, dev, config)["accuracy"])

    return Federation(get_adapter(model), config.num_clients, train, accuracy)


def measure(make: Callable[..., FedAvg], seed: int, num_rounds: int, target: float | None = None) -> Row:
    """Return accuracy and bytes by round of one run, which ends when it has arrived at `target`."""
    return run(federation(seed), make, num_rounds, target=target)


def target_of(baseline: Row) -> float:
    """Return the accuracy to arrive at."""
    return final(baseline["accuracy"]) - MARGIN


def compare(name: str, rows: Sequence[Row], baselines: Sequence[Row]) -> Row:
    """Return the line of one arm: means over the seeds; no bytes if a seed did not arrive."""
    line: dict[str, Any] = {"arm": name, "final": mean(final(row["accuracy"]) for row in rows)}
    targets = [target_of(row) for row in baselines]
    mine = [arrival(row["accuracy"], target) for row, target in zip(rows, targets, strict=True)]
    theirs = [arrival(row["accuracy"], target) for row, target in zip(baselines, targets, strict=True)]
    line["rounds"] = "/".join(map(str, mine))
    if None in mine:
        return line
    for key, ways in {"up": ("uplink",), "down": ("downlink",), "all": ("uplink", "downlink")}.items():
        ours = sum(row[way][at - 1] for row, at in zip(rows, mine, strict=True) for way in ways)
        fedavg = sum(row[way][at - 1] for row, at in zip(baselines, theirs, strict=True) for way in ways)
        line[key], line["times" if key == "all" else f"times-{key}"] = ours / len(rows) / 1e3, fedavg / ours
    return line


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, help="instead of 16, or 1 without --full")
    arguments.add_argument("--seeds", type=int, nargs="+", help="instead of 0 1 2, or 0 without --full")
    options = arguments.parse_args(argv)
    if "FEDKIT_DATA_DIR" not in os.environ:
        sys.exit("Set FEDKIT_DATA_DIR to a folder that has text/sst2/train.jsonl.gz and dev.jsonl.gz.")
    bench = Bench("text_lora", options)
    rounds, seeds = (
        options.rounds or (16 if bench.full else 1),
        options.seeds or ([0, 1, 2] if bench.full else [0]),
    )
    code = sources_digest("fedkit", "strategies", "clients", "examples/text_lora")
    found: dict[str, list[Row]] = {name: [] for name in [FEDAVG, *ARMS]}
    for seed in seeds:
        params: dict[str, Any] = {"seed": seed, "rounds": rounds, **SETTINGS}
        baseline = bench.arm(FEDAVG, partial(measure, FedAvg, seed, rounds), **params)
        found[FEDAVG].append(baseline)
        for name, make in ARMS.items():
            ours = partial(measure, make, seed, 2 * rounds, target_of(baseline))
            found[name].append(bench.arm(name, ours, **params, code=code))
    lines = [compare(name, rows, found[FEDAVG]) for name, rows in found.items()]
    bench.table(f"MiniLM LoRA on SST-2, {rounds} rounds, {len(seeds)} seeds", COLUMNS, lines)
    bench.finish()


if __name__ == "__main__":
    main()
