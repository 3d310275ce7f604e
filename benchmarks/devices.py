"""One federation of different devices: ``python -m benchmarks.devices [--full]``.

Four nodes run an example's own ClientApp: one with a GPU (if there is none, another `cpu`) at LoRA rank 16, one
`cpu` at rank 8, two `mobile` at rank 4, each as the strategy's `Terms` set it for its profile. The server's
adapter has rank 16, and the server averages changes of products. For comparison, the same nodes are run all at
rank 4, with factors averaged; and all at rank 4, with changes of products averaged, so that any gain is due to the
ranks and not to the averaging. Float32 up and down, plain LoRA with α = 2r.

*language*: ``examples/text_lora`` models the sentences of two manuals, byte by byte. Its base model starts from
scratch, so that the factors have much to learn, and a rank of 4 is little. *digits*: the quickstart, with label
skew; its base model is trained on similar images, and rank 4 suffices for the rest.
"""

from __future__ import annotations

import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from flwr.app import ArrayRecord, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.federate import quiet
from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.config import parse
from fedkit.flower import task_identity
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Plain, Terms
from fedkit.submodels import lora_rank

EXAMPLES = Path(__file__).parents[1] / "examples"
WINDOW = 3


@dataclass(frozen=True)
class Task:
    """What a federation learns."""

    app: str
    config: Mapping[str, Any]
    rounds: int
    rates: tuple[float, ...]  # the learning rates that an arm chooses from


LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
LANGUAGE = {"task": "language-modelling", "target-modules": LINEAR, "local-steps": 24, "max-tokens": 48}
TASKS = {
    "language": Task("text_lora", LANGUAGE, rounds=10, rates=(0.003, 0.006, 0.01)),
    "digits": Task("quickstart", {}, rounds=8, rates=(0.005, 0.01)),
}
COLUMNS = {
    "arm": "arm",
    "rate": "learning rate",
    "shown": "accuracy, last 3 rounds, by seed",
    "final": "mean",
    "spread": "± over seeds",
    "loss": "loss",
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


def defaults(task: Task) -> dict[str, Any]:
    """Return the run config that a task begins with."""
    text = (EXAMPLES / task.app / "pyproject.toml").read_text()
    return {**tomllib.loads(text)["tool"]["flwr"]["app"]["config"], **task.config}


def load(task: Task, config: Mapping[str, Any]) -> tuple[ClientApp, Any, Callable[[Any], Mapping[str, float]]]:
    """Return the example's ClientApp, the server's model, and what returns a model's accuracy and loss."""
    sys.path.insert(0, str(EXAMPLES / task.app))
    if task.app == "quickstart":
        from quickstart import client_app
        from quickstart import task as digits

        *_, images, labels = digits.load_split()
        model = digits.build_model(parse(digits.Config, config))
        return client_app.app, model, lambda whole: digits.evaluate(whole, images, labels)
    from text_lora import client_app as text_app
    from text_lora import task as text
    from text_lora.data import load_split
    from text_lora.model import build_model

    typed = parse(text.Config, config)
    _, dev = load_split(typed)
    return text_app.app, build_model(typed), lambda whole: text.evaluate(whole, dev, typed)


def run(task: Task, make: Callable[..., FedAvg], r: int, seed: int, rate: float, num_rounds: int) -> Row:
    """Return the accuracy and the loss of every round."""
    from fedkit.clients.adapters import get_adapter, set_adapter
    from tests.helpers.grid import InProcessGrid

    mine, rounds = nodes(), []  # type: list[dict[str, Any]], list[Mapping[str, float]]
    config = {**defaults(task), **settings(r), "num-clients": len(mine), "seed": seed, "learning-rate": rate}
    config["orth-reg-weight"] = 0.0
    app, whole, test = load(task, config)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round:
            set_adapter(whole, to_arrays(arrays))
            rounds.append(test(whole))
        return MetricRecord()

    grid = InProcessGrid([app] * len(mine))
    for context, node in zip(grid.contexts.values(), mine, strict=True):
        context.node_config.update(node if "submodels" in getattr(make, "keywords", {}) else without(node))
        context.run_config = dict(config)
    options = {"fraction_evaluate": 0.0, "min_train_nodes": len(mine), "min_available_nodes": len(mine)}
    with quiet(), task_identity(run_id=1, node_id=1):
        strategy = make(downlink=None, **options)
        grid_ = RoundGrid(grid)
        strategy.start(grid_, from_arrays(get_adapter(whole)), num_rounds, evaluate_fn=evaluate)
    replies = sum(grid_.ledger.round_totals(k + 1)["replies"] for k in range(num_rounds))
    if replies != num_rounds * len(mine):
        raise RuntimeError(f"expected {num_rounds * len(mine)} replies, got {replies}.")
    return {key: [row[key] for row in rounds] for key in ("accuracy", "loss")}


def without(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a node config that names no part."""
    return {key: value for key, value in config.items() if key != "submodel"}


def compare(name: str, rows: Sequence[Row]) -> Row:
    """Return the line of one arm, at the learning rate that is best for it."""
    by_rate: dict[float, list[Row]] = {}
    for row in rows:
        last = {key: mean(row[key][-WINDOW:]) for key in ("accuracy", "loss")}
        by_rate.setdefault(row["rate"], []).append(last)
    best = max(by_rate, key=lambda rate: mean(row["accuracy"] for row in by_rate[rate]))
    finals = [row["accuracy"] for row in by_rate[best]]
    shown = "/".join(f"{final:.3f}" for final in finals)
    spread = stdev(finals) if len(finals) > 1 else None
    loss = mean(row["loss"] for row in by_rate[best])
    return {"arm": name, "rate": best, "shown": shown, "final": mean(finals), "spread": spread, "loss": loss}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", nargs="+", choices=TASKS, help="instead of all, or of digits without --full")
    arguments.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="instead of all")
    arguments.add_argument("--rounds", type=int, help="instead of 10 and 8, or 1 without --full")
    arguments.add_argument("--seeds", type=int, nargs="+", help="instead of 0 1 2, or 0 without --full")
    arguments.add_argument("--rates", type=float, nargs="+", help="learning rates to choose from")
    options = arguments.parse_args(argv)
    bench = Bench("devices", options)
    seeds = options.seeds or ([0, 1, 2] if bench.full else [0])
    for name in options.tasks or (TASKS if bench.full else ["digits"]):
        task = TASKS[name]
        rounds = options.rounds or (task.rounds if bench.full else 1)
        rates = options.rates or (task.rates if bench.full else task.rates[:1])
        code = sources_digest("fedkit", "strategies", "clients", f"examples/{task.app}")
        found: dict[str, list[Row]] = {arm: [] for arm in options.arms}
        for rate, seed, arm in product(rates, seeds, options.arms):
            make, r = ARMS[arm]
            params = {"task": name, "seed": seed, "rate": rate, "rounds": rounds, "code": code}
            found[arm].append(bench.arm(arm, partial(run, task, make, r, seed, rate, rounds), **params))
        lines = [compare(arm, rows) for arm, rows in found.items()]
        bench.table(f"A GPU or CPU, a CPU and two mobile nodes: {name}, {rounds} rounds", COLUMNS, lines)
    bench.finish()


if __name__ == "__main__":
    main()
