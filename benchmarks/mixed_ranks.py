"""Clients of LoRA ranks 4, 8 and 16 in one federation: ``python -m benchmarks.mixed_ranks [--full]``.

The server's adapter has rank 16. The task is the quickstart's, a small vision transformer on handwritten digits
with label skew, or with ``--task sst2`` that of ``examples/text_lora`` on SST-2, from
``$FEDKIT_DATA_DIR/text/sst2``. Messages are real, float32 up and down, so that only the averaging differs:

* factors, zero-padded: each factor, padded with zeros to rank 16, averaged over all clients;
* factors: each entry averaged over the clients that hold it;
* product: the products averaged, then a truncated SVD;
* frozen A: each entry of B averaged, A as it was initially;
* all r 4, all r 16: every client has the same rank.

Each arm is run with every learning rate and shown with its own best one. The gap is that between the product of
the averaged factors and the mean of the products, averaged over the rounds.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.aggregation.lora import LORA_GAP, Products
from fedkit.aggregation.mean import weighted_mean
from fedkit.aggregation.protocol import Aggregate, Cohort, Upload
from fedkit.arrays import NamedArrays, add
from fedkit.clients import AquilaMod
from fedkit.config import parse
from fedkit.flower import task_identity
from fedkit.message import SUBMODEL, from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Plain
from fedkit.submodels import lora_rank

EXAMPLES = Path(__file__).parents[1] / "examples"
RANKS, WINDOW, SCALING = (4, 8, 16), 3, 2  # scaling: alpha / r, of every rank
COLUMNS = {
    "arm": "arm",
    "rate": "learning rate",
    "final": "accuracy, last 3 rounds",
    "spread": "± over seeds",
    "early": "accuracy, half-way",
    "gap": "lora-gap",
}


class ZeroPadded:
    """Naive averaging: a client of lower rank counts with zeros for what it does not hold."""

    def init(self, params: NamedArrays) -> None:
        """Return nothing: there is nothing to remember."""

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: None
    ) -> Aggregate[None]:
        """Return the mean of the factors."""
        products, held = Products(params), []
        for upload in uploads:
            if upload.arrays is not None:
                held.append((upload.num_examples, add(cohort.sent[upload.node_id], upload.arrays)))
                products.add(*held[-1])
        new = weighted_mean(held, like=params)
        return Aggregate(new, None, {LORA_GAP: products.gap(new)})


def zero_padded(**options: Any) -> Plain:
    """Return the strategy of naive averaging."""
    strategy = Plain(**options)
    strategy.aggregator = ZeroPadded()
    return strategy


MIXED = {"submodels": {f"r{r}": lora_rank(r) for r in RANKS}}
ARMS: dict[str, tuple[Callable[..., FedAvg], Sequence[int]]] = {
    "factors, zero-padded": (partial(zero_padded, **MIXED), RANKS),
    "factors": (partial(Plain, gap=True, **MIXED), RANKS),
    "product": (partial(Plain, lora="product", **MIXED), RANKS),
    "product of updates": (partial(Plain, lora="product-update", **MIXED), RANKS),
    "frozen A": (partial(Plain, lora="ffa", gap=True, **MIXED), RANKS),
    "all r 4": (partial(Plain, gap=True), (4,)),
    "all r 16": (partial(Plain, gap=True), (16,)),
}


@dataclass(frozen=True, eq=False)  # no task is equal to another: what one run trained, or froze, no other sees
class Task:
    """What is trained in one run: an example's functions, with a model for each rank, built once."""

    name: str
    seed: int
    rate: float

    def __post_init__(self) -> None:
        sys.path.insert(0, str(EXAMPLES / self.folder))

    @property
    def folder(self) -> str:
        """The example's folder and package."""
        return "quickstart" if self.name == "digits" else "text_lora"

    def config(self, r: int) -> Any:
        """Return the example's config, with plain LoRA of a rank."""
        text = (EXAMPLES / self.folder / "pyproject.toml").read_text()
        more: dict[str, Any] = {"seed": self.seed, "r": r, "lora-alpha": SCALING * r, "learning-rate": self.rate}
        more |= {"num-clients": 9, "active-rank": r, "orth-reg-weight": 0.0}
        if self.name != "digits":
            data = str(Path(os.environ["FEDKIT_DATA_DIR"]).resolve() / "text" / "sst2")
            more |= {"local-steps": 8, "text-column": "text_a", "data": data}
        return parse(self.module.Config, tomllib.loads(text)["tool"]["flwr"]["app"]["config"] | more)

    @property
    def module(self) -> Any:
        """The example's `task`."""
        from importlib import import_module

        return import_module(f"{self.folder}.task")

    @property
    def source(self) -> Any:
        """The example's module that loads its data."""
        from importlib import import_module

        return self.module if self.name == "digits" else import_module(f"{self.folder}.data")

    @cache  # noqa: B019  # a task lives as long as its run
    def model(self, r: int) -> Any:
        """Return the model with a fresh adapter of a rank."""
        from importlib import import_module

        builder = self.module if self.name == "digits" else import_module(f"{self.folder}.model")
        return builder.build_model(self.config(r))

    @cache  # noqa: B019
    def data(self, client: int) -> tuple[Any, ...]:
        """Return a client's examples, as `train` takes them."""
        found = self.source.load_partition(self.config(RANKS[0]), client)
        return found if isinstance(found, tuple) else (found,)

    @cache  # noqa: B019
    def test(self) -> tuple[Any, ...]:
        """Return the test set, as `evaluate` takes it."""
        if self.name == "digits":
            return tuple(self.source.load_split()[2:])
        return (self.source.load_split(self.config(RANKS[0]))[1], self.config(RANKS[0]))


def run(task: Task, make: Callable[..., FedAvg], ranks: Sequence[int], num_rounds: int, *, frozen: bool) -> Row:
    """Return accuracy and gap by round of one run; client i has the rank ranks[i mod their number]."""
    from fedkit.clients.adapters import freeze_lora_a, get_adapter, set_adapter
    from tests.helpers.grid import InProcessGrid

    app, accuracy = ClientApp(mods=[AquilaMod()]), []
    if frozen:
        for r in ranks:
            freeze_lora_a(task.model(r))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        client = int(context.node_config["partition-id"])
        model, config = task.model(ranks[client % len(ranks)]), task.config(ranks[client % len(ranks)])
        server_round = int(message.content.config_records["config"]["server-round"])
        set_adapter(model, to_arrays(message.content.array_records["arrays"]))
        chance = task.module.local_seed(config, server_round, client)
        metrics = task.module.train(model, *task.data(client), config, seed=chance)
        found = MetricRecord({"num-examples": len(task.data(client)[-1]), **metrics})
        return Message(RecordDict({"arrays": from_arrays(get_adapter(model)), "metrics": found}), reply_to=message)

    whole = task.model(max(ranks))
    begin = get_adapter(whole)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round:
            set_adapter(whole, to_arrays(arrays))
            accuracy.append(task.module.evaluate(whole, *task.test())["accuracy"])
        return MetricRecord()

    everybody = task.config(max(ranks)).num_clients
    grid = InProcessGrid([app] * everybody)
    for number, context in enumerate(grid.contexts.values()):
        context.node_config[SUBMODEL] = f"r{ranks[number % len(ranks)]}"
    strategy = make(downlink=None, fraction_evaluate=0.0, min_train_nodes=everybody, min_available_nodes=everybody)
    result = strategy.start(RoundGrid(grid), from_arrays(begin), num_rounds, evaluate_fn=evaluate)
    gaps = [float(metrics[LORA_GAP]) for metrics in result.train_metrics_clientapp.values()]
    return {"accuracy": accuracy, "gap": gaps}


def compare(name: str, rows: Sequence[Row]) -> Row:
    """Return the line of one arm, at the learning rate whose mean over the seeds is best in the last rounds."""
    by_rate: dict[float, list[Row]] = {}
    for row in rows:
        by_rate.setdefault(row["rate"], []).append(row)
    finals = {rate: [mean(row["accuracy"][-WINDOW:]) for row in some] for rate, some in by_rate.items()}
    best = max(finals, key=lambda rate: mean(finals[rate]))
    return {
        "arm": name,
        "rate": best,
        "final": mean(finals[best]),
        "spread": stdev(finals[best]) if len(finals[best]) > 1 else None,
        "early": mean(row["accuracy"][(len(row["accuracy"]) - 1) // 2] for row in by_rate[best]),
        "gap": mean(mean(row["gap"]) for row in by_rate[best]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--task", choices=["digits", "sst2"], default="digits", help="(%(default)s)")
    arguments.add_argument("--rounds", type=int, help="instead of 12, or 2 without --full")
    arguments.add_argument("--seeds", type=int, nargs="+", help="instead of 0 1 2, or 0 without --full")
    arguments.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="instead of all")
    arguments.add_argument("--rates", type=float, nargs="+", help="learning rates to choose from")
    options = arguments.parse_args(argv)
    if options.task == "sst2" and "FEDKIT_DATA_DIR" not in os.environ:
        sys.exit("Set FEDKIT_DATA_DIR to a folder that has text/sst2/train.jsonl.gz and dev.jsonl.gz.")
    bench = Bench(f"mixed_ranks_{options.task}", options)
    rounds = options.rounds or (12 if bench.full else 2)
    rates = options.rates or ([0.005, 0.002, 0.01] if bench.full else [0.005])
    code = sources_digest("fedkit", "strategies", "clients", f"examples/{Task(options.task, 0, 0.0).folder}")
    found: dict[str, list[Row]] = {name: [] for name in options.arms}
    with task_identity(run_id=1, node_id=1):
        for rate in rates:
            for seed in options.seeds or ([0, 1, 2] if bench.full else [0]):
                for name in options.arms:
                    make, ranks = ARMS[name]
                    measure = partial(
                        run, Task(options.task, seed, rate), make, ranks, rounds, frozen="frozen" in name
                    )
                    params = {"task": options.task, "seed": seed, "rate": rate, "rounds": rounds, "code": code}
                    found[name].append(bench.arm(name, measure, **params))
    lines = [compare(name, rows) for name, rows in found.items()]
    bench.table(f"{options.task}, 9 clients, {rounds} rounds", COLUMNS, lines)
    bench.finish()


if __name__ == "__main__":
    main()
