"""The server's work on a thousand uploads: ``python -m benchmarks.aggregate [--full] [--profile]``.

Real reply messages, as Flower passes them to a strategy: 75,000 parameters in 26 arrays from each client. Flower's
FedAvg gets dense float32 arrays; fedkit's strategies get frames, which they decode. All calls of `aggregate_train`
are timed side by side in one run. The reference is numpy's sum of the plain vectors. Memory is the rise of the
peak above the memory that holds the replies, in units of the parameters.
"""

from __future__ import annotations

import cProfile
import logging
import pstats
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from numpy.typing import NDArray

from benchmarks.harness import Bench, Row, parser, sources_digest
from benchmarks.machine import peak_rise, side_by_side
from fedkit.arrays import flatten, num_values
from fedkit.clients import AquilaMod, ErrorFeedbackMod
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.protocol import Quantizer
from fedkit.flower import Mod, task_identity
from fedkit.message import from_arrays, to_arrays
from fedkit.strategies import Aquila, ErrorFeedback, UpdateStrategy

Update = dict[str, NDArray[np.float32]]
FEDAVG, SUM = "Flower FedAvg, dense float32", "numpy sum of the vectors"
QUANTIZERS: dict[str, Quantizer] = {"1 bit": EntropyConstrained(1.0), "0.25 bit": EntropyConstrained(0.25)}
PAIRS: dict[str, tuple[Callable[..., FedAvg], Mod]] = {
    "fedkit ErrorFeedback": (ErrorFeedback, ErrorFeedbackMod()),
    "fedkit Aquila": (Aquila, AquilaMod()),  # remembers every client's update: memory grows with the clients
}
COLUMNS = {
    "arm": "aggregate_train",
    "seconds": "seconds",
    "times": "FedAvg / it",
    "bits": "bits per value",
    "memory": "peak rise / parameters",
}


def update_of(client: int) -> Update:
    """Return an update like MiniLM's with LoRA on 12 matrices, and a head: 75,000 values in 26 arrays.

    Made as local training makes them: 8 steps of Adam, each of which moves an entry by about the learning rate,
    in a direction that mostly stays. Entries differ little in size, as in `benchmarks.innovations`.
    """
    rng = np.random.default_rng(client)
    sides = {"A": (8, 384), "B": (384, 8)}
    shapes: dict[str, tuple[int, ...]] = {
        f"layer-{i}.lora_{side}": shape for i in range(12) for side, shape in sides.items()
    }
    shapes |= {"head.weight": (10, 127), "head.bias": (2,)}
    update = {}
    for name, shape in shapes.items():
        drift, rate = rng.standard_normal(shape, np.float32), np.float32(rng.uniform(0.7e-3, 1.4e-3))
        steps = [np.tanh(2 * (drift + rng.standard_normal(shape, np.float32))) for _ in range(8)]
        update[name] = rate * np.sum(steps, axis=0)
    return update


def app_of(*mods: Mod) -> ClientApp:
    """Return a ClientApp that adds its `update_of` to what it receives."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        update = update_of(int(context.node_config["partition-id"]))
        local = {name: array + update[name] for name, array in to_arrays(record).items()}
        metrics = MetricRecord({"num-examples": 10 + context.node_id % 7, "train-loss": 0.5})
        return Message(RecordDict({"arrays": from_arrays(local), "metrics": metrics}), reply_to=message)

    return app


def answered(make: Callable[..., FedAvg], clients: int, *mods: Mod) -> tuple[FedAvg, list[Message]]:
    """Return a strategy that has asked all clients, and their replies as Flower hands them over."""
    from tests.helpers.grid import InProcessGrid

    strategy = make(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    start = from_arrays({name: np.zeros_like(array) for name, array in update_of(0).items()})
    grid = InProcessGrid([app_of(*mods)] * clients)
    messages = strategy.configure_train(1, start, ConfigRecord(), grid)
    return strategy, list(grid.send_and_receive(messages))


def bits_of(replies: Sequence[Message]) -> float:
    """Return the bits per value of the replies' arrays."""
    records = [record for reply in replies for record in reply.content.array_records.values()]
    sizes = [len(array.data) for record in records for array in record.values()]
    return 8 * sum(sizes) / (len(replies) * num_values(update_of(0)))


def measure(clients: int, repeats: int, profile: bool) -> list[Row]:
    """Return a row for each arm, all timed side by side."""
    vectors = [flatten(update_of(client)) for client in range(clients)]
    plain, bits = vectors[0].nbytes, {SUM: 32.0}
    arms: dict[str, Callable[[], object]] = {SUM: lambda: _sum(vectors)}
    found = {FEDAVG: answered(FedAvg, clients)}
    for amount, quantizer in QUANTIZERS.items():
        for name, (make, mod) in PAIRS.items():
            found[f"{name}, {amount}"] = answered(partial(make, quantizer=quantizer), clients, mod)
    for name, (strategy, replies) in found.items():
        arms[name], bits[name] = partial(_aggregate, strategy, replies), bits_of(replies)
    memory = {name: peak_rise(run) / plain for name, run in arms.items()}
    seconds = side_by_side(arms, repeats=repeats)
    if profile:
        for name, run in arms.items():
            _profile(name, run)
    return [
        {
            "arm": n,
            "seconds": seconds[n],
            "times": seconds[FEDAVG] / seconds[n],
            "bits": bits[n],
            "memory": memory[n],
        }
        for n in arms
    ]


def _sum(vectors: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    total = np.zeros_like(vectors[0])
    for vector in vectors:
        total += vector
    return total


def _aggregate(strategy: FedAvg, replies: Sequence[Message]) -> ArrayRecord:
    if isinstance(strategy, UpdateStrategy):
        strategy.registry.accepted = {}  # else uploads that were accepted before are refused
    arrays, _ = strategy.aggregate_train(1, replies)
    if arrays is None:
        raise RuntimeError("the strategy refused all replies.")
    return arrays


def _profile(name: str, run: Callable[[], object]) -> None:
    profiler = cProfile.Profile()
    profiler.runcall(run)
    print(f"\n{name}")
    pstats.Stats(profiler).strip_dirs().sort_stats("tottime").print_stats(14)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--profile", action="store_true", help="print where the time goes (with --fresh)")
    arguments.add_argument("--clients", type=int, help="how many uploads")
    options = arguments.parse_args(argv)
    logging.getLogger("flwr").setLevel(logging.ERROR)
    bench = Bench("aggregate", options)
    clients, repeats = options.clients or (1000 if bench.full else 100), 5 if bench.full else 3
    with task_identity(run_id=1, node_id=1):
        code = sources_digest("fedkit", "strategies", "clients")
        found = bench.arm(
            "side by side",
            lambda: {"arms": measure(clients, repeats, options.profile)},
            clients=clients,
            code=code,
        )
    bench.table(f"{clients:,} uploads of 75,000 parameters in 26 arrays", COLUMNS, found["arms"])
    bench.finish()


if __name__ == "__main__":
    main()
