"""The progress of a run and its checkpoint, which is saved after each round and resumed by the next `start`."""

from __future__ import annotations

import functools
import json
import logging
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Final, ParamSpec, TypeVar

from flwr.app import ArrayRecord, MetricRecord
from flwr.serverapp.strategy import Result

from fedkit import checkpoint
from fedkit.arrays import NamedArrays, schema_digest
from fedkit.checkpoint import Tree
from fedkit.codec.names import to_text
from fedkit.errors import ConfigError
from fedkit.files import exclusive
from fedkit.ledger import JOURNAL, Ledger

from .registry import Registry

if TYPE_CHECKING:
    from .base import UpdateStrategy

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound="UpdateStrategy[Any]")

LOCK: Final = "lock"  # the file that a server holds while it runs
_KINDS: Final = ("train", "evaluate", "server")  # of metrics: two from clients; "server": from `evaluate_fn`


class Progress:
    """The id of a run, its number of rounds so far, and their metrics.

    Parameters
    ----------
    folder : Path, optional
        Where the run is saved; None: nowhere.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.begin()

    def begin(self) -> None:
        """Start a new run: clients must not continue with what they remember of a former one."""
        self.experiment = secrets.token_hex(8)
        self.before = 0  # rounds that were run before this `start`; Flower counts from 1 again
        self.server_round = 0  # the last one that was saved
        self._metrics: dict[str, dict[int, dict[str, Any]]] = {kind: {} for kind in _KINDS}

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other servers out of the folder; the lock ends with the process, however that ends.

        Raises
        ------
        StateError
            If the folder cannot be written.
        ConfigError
            If another server is using it.
        """
        if self.folder is None:
            yield
            return
        busy = (
            f"the checkpoint in {self.folder}: another server is using it. Wait for it, end it, or choose another "
            "folder."
        )
        with exclusive(self.folder / LOCK, busy):
            yield

    def note(self, kind: str, server_round: int, metrics: MetricRecord | None) -> None:
        """Remember the metrics of a round."""
        if metrics is not None:
            self._metrics[kind][server_round] = dict(metrics)

    def save(
        self, strategy: UpdateStrategy[Any], server_round: int, params: NamedArrays, metrics: MetricRecord | None
    ) -> None:
        """Save the whole run after a round; raises StateError if that fails."""
        self.note("server", server_round, metrics)
        self.server_round = server_round
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        tree = {
            "of": fingerprint(strategy, params),
            "experiment": self.experiment,
            "round": server_round,
            "metrics": json.dumps(self._metrics),  # one value: they are many
            "params": dict(params),
            "ordinary": strategy.border.packed,
            "downlink": strategy.downlink.remember(),
            "accepted": strategy.registry.accepted,
            "held": strategy.registry.held(),
            "state": strategy.remember(),
            "ledger": (strategy.ledger.journal(self.folder / JOURNAL), strategy.ledger.seconds),
        }
        checkpoint.save(self.folder, tree)

    def resume(self, strategy: UpdateStrategy[Any], params: NamedArrays, ledger: Ledger) -> NamedArrays | None:
        """Resume the run in the folder and return its arrays; None if there is no run: a new one begins.

        Raises
        ------
        StateError
            If the checkpoint cannot be read.
        ConfigError
            If it belongs to another strategy or to other arrays.
        """
        saved = None if self.folder is None else checkpoint.load(self.folder, *strategy.state_types)
        if saved is None or self.folder is None:
            self.begin()
            strategy.registry = Registry(strategy.parts.name_of)
            return None
        for key, value in fingerprint(strategy, saved["params"]).items():
            if saved["of"].get(key) != value:
                raise ConfigError(
                    f"the checkpoint in {self.folder}: expected {key} {value}, got {saved['of'].get(key)}. "
                    "Choose another folder, or delete it to start anew."
                )
        if schema_digest(params) != schema_digest(saved["params"]):
            raise ConfigError(f"the checkpoint in {self.folder} is of arrays of other names or shapes.")
        self.experiment, metrics = saved["experiment"], saved["metrics"]
        if isinstance(metrics, str):
            metrics = {k: {int(r): m for r, m in each.items()} for k, each in json.loads(metrics).items()}
        self._metrics = metrics
        self.before = self.server_round = saved["round"]
        found: NamedArrays = saved["params"]
        strategy.border.recall(saved.get("ordinary", b""))
        strategy.downlink.recall(saved["downlink"], found)
        strategy.registry.accepted = saved["accepted"]
        strategy.registry.recall(saved.get("held", {}), strategy.downlink.versions)
        strategy.recall(found, saved["state"])
        strategy._params = found
        size, seconds = saved["ledger"]
        ledger.restore(self.folder / JOURNAL, size, seconds)
        logger.info("Resumed after round %d: Flower's round 1 is round %d.", self.before, self.before + 1)
        return found

    def complete(self, result: Result, params: ArrayRecord) -> Result:
        """Return Flower's result with the metrics of the whole run, and with `params` if no round was left."""
        shown: Mapping[str, dict[int, MetricRecord]] = {
            "train": result.train_metrics_clientapp,
            "evaluate": result.evaluate_metrics_clientapp,
            "server": result.evaluate_metrics_serverapp,
        }
        for kind, by_round in shown.items():
            now = {server_round + self.before: metrics for server_round, metrics in by_round.items()}
            then = {k: MetricRecord(m) for k, m in self._metrics[kind].items() if k <= self.before}
            by_round.clear()
            by_round.update(then | now)
        if not result.arrays:
            result.arrays = params
        return result


def alone(start: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Let a strategy's `start` run while no other server has its checkpoint."""

    @functools.wraps(start)
    def run(strategy: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
        with strategy.progress.locked():
            return start(strategy, *args, **kwargs)

    return run


def fingerprint(strategy: UpdateStrategy[Any], params: NamedArrays) -> dict[str, Tree]:
    """Return what a resumed run must have in common with the one it resumes."""
    downlink = strategy.downlink.codec
    return {
        "strategy": type(strategy).__name__,
        "aggregation": repr(strategy.aggregator),
        "codec": to_text(strategy.codec),
        "downlink": None if downlink is None else to_text(downlink),
        "seed": strategy.seed,
        "parts": None if strategy.parts.trivial else [strategy.parts.lora, *strategy.parts.terms],
        "rows": strategy.parts.rows.mask and repr(strategy.parts.rows.mask),
        "schema": schema_digest(params),
    }
