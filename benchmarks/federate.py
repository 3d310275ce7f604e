"""Runs a strategy in this process, with real, serialised messages, and records each round's cost and result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from benchmarks.harness import Row
from fedkit.arrays import NamedArrays, num_values
from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod
from fedkit.codec.wire import open_frame
from fedkit.faults import Faults
from fedkit.flower import ClientAppCallable, task_identity
from fedkit.message import STYPE, from_arrays, to_arrays
from fedkit.rounds import RoundGrid

SCALE_AND_BITS = 40  # what a paper counts of a group besides its levels: a float32 and a byte
WINDOW = 3  # successive accuracies that are averaged
TRAFFIC = ("uplink", "uplink-frame", "downlink", "downlink-frame")

Reply = tuple[NamedArrays, dict[str, float]]  # arrays and metrics, "num-examples" among them


@dataclass(frozen=True)
class Federation:
    """What is trained, by whom, and how it is judged; a strategy is all that is missing."""

    initial: NamedArrays
    num_clients: int
    train: Callable[[NamedArrays, int, int], Reply]  # of received arrays, client and round
    accuracy: Callable[[NamedArrays], float]
    submodels: Sequence[str] = ()  # which part each client holds; none: all hold the whole


class ArrivedError(Exception):
    """The target is reached: nothing more is to be learned from this run."""


def arrival(accuracy: Sequence[float], target: float) -> int | None:
    """Return how many accuracies it takes until the mean of the last 3 is at least `target`; None: all do not."""
    ends = range(WINDOW, len(accuracy) + 1)
    return next((k for k in ends if mean(accuracy[k - WINDOW : k]) >= target), None)


def final(accuracy: Sequence[float]) -> float:
    """Return the mean of the last 3."""
    return mean(accuracy[-WINDOW:])


@dataclass
class Published:
    """A mod that counts uploads as papers do: packed levels, a scale and a byte for each group, no entropy coding.

    A frame is what really travels; it may be smaller, for its levels are entropy-coded if that is worth it.
    """

    like: NamedArrays  # what the app trained last: an upload has its names and shapes
    bits: int = 0
    uploads: int = 0

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Return the reply as it is."""
        reply = call_next(message, context)
        for record in reply.content.array_records.values() if reply.has_content() else ():
            self.uploads += 1
            self.bits += self._bits(record)
        return reply

    def _bits(self, record: ArrayRecord) -> int:
        arrays = list(record.values())
        if arrays[0].stype != STYPE:
            return 32 * num_values(to_arrays(record))
        frame = open_frame(arrays[0].data, like=self.like)
        raw = 0 if frame.raw is None else 32 * frame.raw.size
        return raw + sum(group.bits * levels.size + SCALE_AND_BITS for group, levels in frame.groups)


def run(
    federation: Federation,
    make: Callable[..., FedAvg],
    num_rounds: int,
    *,
    every: int = 1,
    target: float | None = None,
    faults: Faults | None = None,
) -> Row:
    """Return accuracy and bytes so far of every `every`-th round; the run ends when it has arrived at `target`.

    What goes wrong is `faults`; nothing if unset.

    Bytes are all of Flower's objects, or those of the frames alone, by direction; ``published`` are those that a
    paper would count for the same uploads. ``uploads`` and ``asked`` are counts of the whole run.
    """
    published = Published(federation.initial)
    app, found = _app(federation, published), _Found(every)
    everybody = federation.num_clients

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        if server_round and server_round % every == 0:
            found.accuracy.append(round(federation.accuracy(to_arrays(arrays)), 6))
            found.published.append(published.bits // 8)
            if target is not None and arrival(found.accuracy, target):
                raise ArrivedError
        return MetricRecord()

    from tests.helpers.grid import InProcessGrid

    inner = InProcessGrid([app] * everybody)
    for context, name in zip(inner.contexts.values(), federation.submodels, strict=False):
        context.node_config["submodel"] = name
    grid = RoundGrid(inner, faults=faults)
    with quiet(losses=faults is not None), task_identity(run_id=1, node_id=1), suppress(ArrivedError):
        strategy = make(fraction_evaluate=0.0, min_train_nodes=everybody, min_available_nodes=everybody)
        strategy.start(grid, from_arrays(federation.initial), num_rounds, evaluate_fn=evaluate)
    counts = {"uploads": published.uploads, "parameters": num_values(federation.initial)}
    return {**found.row(grid), **counts}


@dataclass
class _Found:
    """What is known of a run so far."""

    every: int

    def __post_init__(self) -> None:
        self.accuracy: list[float] = []
        self.published: list[int] = []

    def row(self, grid: RoundGrid) -> Row:
        """Return it, with what the ledger says."""
        totals = [grid.ledger.round_totals(k + 1) for k in range(self.every * len(self.accuracy))]
        traffic = {way: list(accumulate(t[f"{way}-bytes"] for t in totals)) for way in TRAFFIC}
        rows: dict[str, Any] = {way: values[self.every - 1 :: self.every] for way, values in traffic.items()}
        asked = sum(t["asked"] for t in totals)
        return {
            "every": self.every,
            "accuracy": self.accuracy,
            **rows,
            "published": self.published,
            "asked": asked,
        }


def _app(federation: Federation, published: Published) -> ClientApp:
    """Return the app of all clients; each mod acts on the messages of its own strategy."""
    app = ClientApp(mods=[published, AquilaMod(), ErrorFeedbackMod(), SafariMod()])

    @app.train()
    def train(message: Message, context: Context) -> Message:
        server_round = int(message.content.config_records["config"]["server-round"])  # type: ignore[arg-type]
        (record,) = message.content.array_records.values()
        local, metrics = federation.train(
            to_arrays(record), int(context.node_config["partition-id"]), server_round
        )
        published.like = local
        return Message(
            RecordDict({"arrays": from_arrays(local), "metrics": MetricRecord(dict(metrics))}), reply_to=message
        )

    return app


@contextmanager
def quiet(*, losses: bool = False) -> Iterator[None]:
    """Let fedkit log warnings only, and Flower errors only: it warns of every run that nobody evaluates.

    With `losses`, fedkit errors only, too: it warns of every reply that is lost.
    """
    fedkit = logging.ERROR if losses else logging.WARNING
    loggers = {logging.getLogger("fedkit"): fedkit, logging.getLogger("flwr"): logging.ERROR}
    before = {logger: logger.level for logger in loggers}
    try:
        for logger, level in loggers.items():
            logger.setLevel(level)
        yield
    finally:
        for logger, level in before.items():
            logger.setLevel(level)
