"""Clients of the gradient mode: one step of SGD per round on a strongly convex quadratic of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from fedkit.arrays import flatten, unflatten
from fedkit.clients import AquilaMod
from fedkit.codec.wire import open_frame
from fedkit.message import from_arrays, read_frame, read_report, records_of, to_arrays
from tests.helpers.quadratic import LIKE

Vector = NDArray[np.float64]
SIZE = sum(array.size for array in LIKE.values())


@dataclass(frozen=True)
class Quadratic:
    """``f(θ) = ½ Σ hᵢ (θᵢ − tᵢ)²``, with a few large entries among many small ones, as gradients have."""

    target: Vector
    curvature: Vector

    @classmethod
    def draw(cls, seed: int, tail: float = 1.5) -> Quadratic:
        rng = np.random.default_rng(seed)
        return cls(rng.normal(size=SIZE) * rng.lognormal(sigma=tail, size=SIZE), rng.uniform(0.2, 1.0, SIZE))

    def loss(self, theta: Vector) -> float:
        return float((self.curvature * np.square(theta - self.target)).sum() / 2)

    def gradient(self, theta: Vector) -> Vector:
        return self.curvature * (theta - self.target)


def optimum(problems: Sequence[Quadratic]) -> Vector:
    """Return where the mean of the gradients is zero."""
    weights = sum(p.curvature for p in problems)
    return sum(p.curvature * p.target for p in problems) / weights


@dataclass
class Sent:
    """What one client sent in one round."""

    bits: int  # 0: silence
    levels: NDArray[np.uint16]


def app_of(
    problem: Quadratic,
    rate: float | None,
    *,
    seen: list[Sent] | None = None,
    mods: Sequence[Callable] = (),
    noise: float = 0.0,
) -> ClientApp:
    """Return a client that steps by `rate`, or by the round's ``step-size``; `seen` gets what it sends."""

    def spy(message: Message, context: Context, call_next: Callable) -> Message:
        reply = call_next(message, context)
        if seen is not None and reply.has_content():
            if read_report(reply.content).skipped:
                seen.append(Sent(0, np.zeros(0, np.uint16)))
            else:
                groups = open_frame(read_frame(reply.content), like=LIKE).groups
                bits = groups[0].group.bits if groups else 32
                seen.append(Sent(bits, np.concatenate([np.zeros(0, np.uint16), *(g.levels for g in groups)])))
        return reply

    app = ClientApp(mods=[*mods, spy, AquilaMod()])
    rng = np.random.default_rng(0)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        config = message.content.config_records["config"]
        (record,) = records_of(message.content, type(message.content.array_records["arrays"]))
        theta = flatten(to_arrays(record)).astype(np.float64)
        step = config["step-size"] if rate is None else rate
        gradient = problem.gradient(theta) + noise * rng.normal(size=SIZE)
        local = unflatten((theta - step * gradient).astype(np.float32), like=LIKE)
        metrics = MetricRecord({"num-examples": 1, "train-loss": problem.loss(theta)})
        return Message(RecordDict({"arrays": from_arrays(local), "metrics": metrics}), reply_to=message)

    return app
