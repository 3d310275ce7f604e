"""One federation of unlike devices: ``python -m benchmarks.devices [--full]``.

Four nodes with the quickstart's own ClientApp: one with a GPU (where there is none, another `cpu`) at LoRA rank
16, one `cpu` at rank 8, two `mobile` at rank 4, each as the strategy's `Terms` for its profile say; the server's
adapter has rank 16, and averages changes of products. Beside it the same nodes, all at rank 4, factors averaged;
and all at rank 4, changes of products averaged, so that what is better is the ranks and not the averaging. Digits
with label skew, float32 up and down, plain LoRA of α = 2r.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg

from benchmarks.federate import quiet
from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.config import parse
from fedkit.flower import task_identity
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Plain, Terms
from fedkit.submodels import lora_rank

APP = Path(__file__).parents[1] / "examples" / "quickstart"
WINDOW = 3
COLUMNS = {
    "arm": "arm",
    "rate": "learning rate",
    "shown": "accuracy, last 3 rounds, by seed",
    "final": "mean",
    "spread": "± over seeds",
}


def settings(r: int) -> dict[str, Any]:
    """Return the run config's keys for plain LoRA of a rank."""
    return {"r": r, "lora-alpha": 2 * r, "active-rank": r}


def terms(r: int) -> Terms:
    """Return the terms of nodes that hold a rank."""
    return Terms(cut=lora_rank(r), config=settings(r))


TERMS = {"gpu": terms(16), "r16": terms(16), "cpu": terms(8), "mobile": terms(4)}
ARMS: dict[str, tuple[Callable[..., FedAvg], int]] = {
    "16/8/4/4": (partial(Plain, lora="product-update", submodels=TERMS), 16),
    "all 4, factors": (Plain, 4),
    "all 4, products": (partial(Plain, lora="product-update"), 4),
}


def nodes() -> list[dict[str, Any]]:
    """Return the node configs."""
    import torch

    first = {"profile": "gpu"} if torch.cuda.is_available() else {"profile": "cpu", "submodel": "r16"}
    mobile = {"profile": "mobile", "memory-mb": 100_000}  # all nodes are in one process here
    return [first, {"profile": "cpu"}, mobile, mobile]


def run(make: Callable[..., FedAvg], r: int, seed: int, rate: float, num_rounds: int) -> Row:
    """Return the accuracy of every round."""
    sys.path.insert(0, str(APP))
    from quickstart import client_app, task

    from fedkit.clients.adapters import get_adapter, set_adapter
    from tests.helpers.grid import InProcessGrid

    defaults: Mapping[str, Any] = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"][
        "config"
    ]
    mine, accuracy = nodes(), []  # type: list[dict[str, Any]], list[float]
    found = {**defaults, **settings(r), "num-clients": len(mine), "seed": seed, "learning-rate": rate}
    found["orth-reg-weight"] = 0.0
    whole, (_, _, images, labels) = task.build_model(parse(task.Config, found)), task.load_split()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round:
            set_adapter(whole, to_arrays(arrays))
            accuracy.append(task.evaluate(whole, images, labels)["accuracy"])
        return MetricRecord()

    grid = InProcessGrid([client_app.app] * len(mine))
    for context, config in zip(grid.contexts.values(), mine, strict=True):
        context.node_config.update(config if "submodels" in getattr(make, "keywords", {}) else without(config))
        context.run_config = dict(found)
    options = {"fraction_evaluate": 0.0, "min_train_nodes": len(mine), "min_available_nodes": len(mine)}
    with quiet(), task_identity(run_id=1, node_id=1):
        strategy = make(downlink=None, **options)
        grid_ = RoundGrid(grid)
        strategy.start(grid_, from_arrays(get_adapter(whole)), num_rounds, evaluate_fn=evaluate)
    replies = sum(grid_.ledger.round_totals(k + 1)["replies"] for k in range(num_rounds))
    if replies != num_rounds * len(mine):
        raise RuntimeError(f"expected {num_rounds * len(mine)} replies, got {replies}.")
    return {"accuracy": accuracy}


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node config that names no part."""
    return {key: value for key, value in config.items() if key != "submodel"}


def compare(name: str, rows: Sequence[Row]) -> Row:
    """Return the line of one arm, at the learning rate that is best for it."""
    by_rate: dict[float, list[float]] = {}
    for row in rows:
        by_rate.setdefault(row["rate"], []).append(mean(row["accuracy"][-WINDOW:]))
    best = max(by_rate, key=lambda rate: mean(by_rate[rate]))
    finals = by_rate[best]
    shown = "/".join(f"{final:.3f}" for final in finals)
    spread = stdev(finals) if len(finals) > 1 else None
    return {"arm": name, "rate": best, "shown": shown, "final": mean(finals), "spread": spread}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, help="instead of 8, or 1 without --full")
    arguments.add_argument("--seeds", type=int, nargs="+", help="instead of 0 1 2, or 0 without --full")
    arguments.add_argument("--rates", type=float, nargs="+", help="learning rates to choose from")
    options = arguments.parse_args(argv)
    bench = Bench("devices", options)
    rounds = options.rounds or (8 if bench.full else 1)
    rates = options.rates or ([0.005, 0.01] if bench.full else [0.005])
    code = sources_digest("fedkit", "strategies", "clients", "examples/quickstart")
    found: dict[str, list[Row]] = {name: [] for name in ARMS}
    for rate in rates:
        for seed in options.seeds or ([0, 1, 2] if bench.full else [0]):
            for name, (make, r) in ARMS.items():
                params = {"seed": seed, "rate": rate, "rounds": rounds, "code": code}
                found[name].append(bench.arm(name, partial(run, make, r, seed, rate, rounds), **params))
    lines = [compare(name, rows) for name, rows in found.items()]
    bench.table(f"A GPU or CPU, a CPU and two mobile nodes, {rounds} rounds", COLUMNS, lines)
    bench.finish()


if __name__ == "__main__":
    main()
