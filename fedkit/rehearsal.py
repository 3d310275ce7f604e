"""An app's own server, run here for a few rounds against clients that do not train.

The server is the app's, with its strategy and its initial arrays. The clients have the app's mods, and take a
random step of the same shapes instead of training. So everything sent is coded, serialised and counted as in a
run, but nothing is learnt. If the server asks for features, the simulated clients send some, once; it is not known
whether the app would, so for an app without features the first upload is about a kilobyte per slot too long.
Whatever the server needs to run must be installed here, and be found where the server looks for it; no client's
data is needed, unless the clients are to train. The rehearsal is a process of its own,
``python -m fedkit.rehearsal TASK OUT``.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import tomllib
import tracemalloc
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fedkit.aggregation.slots import count_slots
from fedkit.arrays import NamedArrays, num_values
from fedkit.booking import Booking
from fedkit.clients.features import Features
from fedkit.config import Scalar
from fedkit.errors import ConfigError
from fedkit.flower import context_to_bytes, mods_of, task_identity
from fedkit.in_process import InProcessGrid
from fedkit.ledger import Ledger
from fedkit.message import from_arrays, records_of, round_of, rows_of, to_arrays
from fedkit.report import read_rounds
from fedkit.state import STATE_DIR

STEP: Final = 0.01  # standard deviation of the random step
MOST_CLIENTS: Final = 50  # at most, that take part; if there are more, each represents several


class EnoughError(BaseException):
    """The requested rounds are over; not an Exception, so that no app catches it."""


class Rehearsal(InProcessGrid):
    """A Grid that books all messages to and from its nodes, and ends the server after some rounds.

    Parameters
    ----------
    app : ClientApp
        The app's own, with its mods.
    config : mapping
        The run config.
    clients, rounds : int
        How many of them.
    train : bool
        Let `app` itself train, rather than its stand-in.
    """

    def __init__(
        self, app: ClientApp, config: Mapping[str, Scalar], clients: int, rounds: int, *, train: bool
    ) -> None:
        self.rounds, self.ledger, self.peak, self.values = rounds, Ledger(), 0, 0
        self._booking, self._app, self._client = Booking(self.ledger), app, app if train else stand_in(app)
        super().__init__([self._answer_of] * clients, config)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until they are answered; raise EnoughError for those of a round beyond the last."""
        messages = list(messages)
        for message in messages:
            if message.metadata.message_type == MessageType.TRAIN and round_of(message) > self.rounds:
                raise EnoughError
            self._booking.enter(message, round_of(message), message.metadata.dst_node_id, "downlink")
        return super().push_messages(messages)

    def answer(self, message: Message) -> Message:
        """Return a node's reply, and book it."""
        reply = super().answer(message)
        if reply.has_error():
            raise ConfigError(f"a client cannot be rehearsed: {reply.error.reason}")
        self._booking.meet(reply)
        self._booking.enter(reply, round_of(message), message.metadata.dst_node_id, "uplink")
        return reply

    def _answer_of(self, message: Message, context: Context) -> Message:
        """Return the app's own reply to a query, else that of the training client; measure one client's memory."""
        kind = message.metadata.message_type
        if kind.split(".")[0] == MessageType.QUERY:
            return self._app(message, context)
        if kind != MessageType.TRAIN or self.peak or round_of(message) < self.rounds:
            return self._client(message, context)
        tracemalloc.start()
        try:
            reply = self._client(message, context)
            self.peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        (record,) = records_of(message.content, ArrayRecord)
        self.values = num_values(to_arrays(record))
        return reply


def stand_in(app: ClientApp) -> ClientApp:
    """Return a ClientApp with the mods of `app` that takes a random step instead of training."""
    other = ClientApp(mods=mods_of(app))

    @other.train()
    def train(message: Message, context: Context) -> Message:
        (record,) = records_of(message.content, ArrayRecord)
        rng = np.random.default_rng([round_of(message), context.node_id])
        local, rows = random_step(to_arrays(record), rng), rows_of(message)
        if rows is not None:
            resting = to_arrays(record)
            part = rows.submodel(resting).index_sets
            for name, array in resting.items():
                array[np.ix_(*part[name])] = local[name][np.ix_(*part[name])]
            local = resting
        metrics = MetricRecord({"num-examples": 100, "train-loss": float(rng.random())})
        content = RecordDict({"arrays": from_arrays(local), "metrics": metrics})
        Features.at_random(message, count_slots(local), rng).write(content)
        return Message(content, reply_to=message)

    @other.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 100, "accuracy": 0.5, "loss": 1.0})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return other


def random_step(arrays: NamedArrays, rng: np.random.Generator) -> dict[str, Any]:
    """Return arrays moved by Gaussian noise."""
    return {name: a + STEP * rng.standard_normal(a.shape, np.float32) for name, a in arrays.items()}


def rehearse(
    app_dir: Path, config: Mapping[str, Scalar], rounds: int, folder: Path, *, train: bool = False
) -> dict[str, Any]:
    """Return the bytes sent in the first rounds of a run with `config`, and what a client needs.

    The server writes into `folder`; with `train`, the clients train, and need their data.
    """
    sys.path.insert(0, str(app_dir))
    names = tomllib.loads((app_dir / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]["components"]
    client, server = _load(names["clientapp"], ClientApp), _load(names["serverapp"], ServerApp)
    clients = min(int(config["num-clients"]), MOST_CLIENTS)
    config = {**config, "num-clients": clients, "run-dir": str(folder / "server")}
    if "faults" in config:
        config["faults"] = ""
    os.environ.pop(STATE_DIR, None)  # so that clients' memories stay in their Contexts
    grid = Rehearsal(client, config, clients, rounds, train=train)
    empty = len(context_to_bytes(grid.contexts[1000]))
    with task_identity(run_id=1, node_id=1):
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=dict(config))
        with suppress(EnoughError):
            server(grid, context)
    skips = {row["round"]: row.get("skips", 0) for row in read_rounds(folder / "server" / "rounds.jsonl")}
    return {
        "clients": clients,
        "values": grid.values,
        "state-bytes": max(len(context_to_bytes(node)) for node in grid.contexts.values()) - empty,
        "peak-bytes": grid.peak,
        "rounds": [
            {**_counted(grid.ledger, k, train), "skips": skips.get(k, 0) if train else 0}
            for k in sorted(grid.ledger.entries)
            if k
        ],
    }


def _counted(ledger: Ledger, server_round: int, train: bool) -> dict[str, Any]:
    """Return the bytes of a round; if clients do not train, uploads count as if none were skipped."""
    totals: dict[str, Any] = {"round": server_round}
    entries = ledger.entries[server_round]
    for direction in ("uplink", "downlink"):
        those = [e for e in entries if e.direction == direction]
        sent = [e for e in those if train or e.frame_bytes or e.kind != MessageType.TRAIN]
        times = 1 if train else len(those) / max(1, len(sent))
        totals[f"{direction}-bytes"] = round(times * sum(e.object_bytes for e in sent))
        totals[f"{direction}-frame-bytes"] = round(times * sum(e.frame_bytes for e in sent))
    totals["asked"] = sum(e.direction == "downlink" and e.kind == MessageType.TRAIN for e in entries)
    return totals


def _load(name: str, kind: type[Any]) -> Any:
    """Return a component of an app, named ``module:attribute``."""
    module, _, attribute = name.partition(":")
    found = getattr(importlib.import_module(module), attribute)
    if not isinstance(found, kind):
        raise ConfigError(f"{name}: expected a {kind.__name__}, got {type(found).__name__}.")
    return found


def main() -> None:
    """Read a task, rehearse it, and write the result."""
    task = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    folder, train = Path(sys.argv[1]).parent, task["train"]
    found = rehearse(Path(task["app-dir"]), task["config"], task["rounds"], folder, train=train)
    Path(sys.argv[2]).write_text(json.dumps(found), "utf-8")


if __name__ == "__main__":
    main()
