"""A numpy Flower app whose optimum is known: client i pulls the parameters towards its own target."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.arrays import NamedArrays
from fedkit.message import from_arrays, to_arrays

LIKE = {"lora_A": np.zeros((4, 12), np.float32), "lora_B": np.zeros((10, 4), np.float32)}


def targets(num_clients: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(seed)
    return [
        {name: rng.normal(size=a.shape).astype(np.float32) for name, a in LIKE.items()} for _ in range(num_clients)
    ]


def optimum(num_clients: int, seed: int = 0) -> np.ndarray:
    """The mean of the targets, flat."""
    return np.mean([np.concatenate([a.ravel() for a in t.values()]) for t in targets(num_clients, seed)], axis=0)


def client_app(
    mods: list,
    target: NamedArrays,
    *,
    rate: float = 0.3,
    num_examples: int = 10,
    tamper: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda local: local,
) -> ClientApp:
    """One gradient step of length `rate` towards `target`."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        received = to_arrays(record)
        local = {name: a + np.float32(rate) * (target[name] - a) for name, a in received.items()}
        metrics = MetricRecord({"num-examples": num_examples, "loss": 1.0})
        content = RecordDict({"arrays": from_arrays(tamper(local)), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        (record,) = message.content.array_records.values()
        loss = sum(float(np.square(a - target[n]).sum()) for n, a in to_arrays(record).items())
        metrics = MetricRecord({"num-examples": num_examples, "eval-loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def initial() -> ArrayRecord:
    return from_arrays(LIKE)
