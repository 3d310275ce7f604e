"""Live tracking of rounds in TensorBoard and MLflow, besides the JSON lines that are always written.

A tracker gets every number of a round: the metrics, the counts, the bytes, and what clients measured in training
as ``train/NAME``. It follows whatever `fedkit run` follows, so runs at a SuperLink are tracked, too. A tracker
that fails during a run is dropped with a warning.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, Protocol

from fedkit.errors import ConfigError, LaunchError
from fedkit.ledger import TRAIN
from fedkit.plan import Arm
from fedkit.report import Row

logger = logging.getLogger(__name__)

MLFLOW_RUN: Final = "mlflow-run-id"  # a file in an arm's folder: a resumed arm continues the same run
_PATIENCE: Final = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}  # not for minutes


class Tracker(Protocol):
    """Something that shows numbers over rounds."""

    def record(self, server_round: int, numbers: Mapping[str, float]) -> None:
        """Take the numbers of a round."""

    def end(self, *, completed: bool) -> None:
        """Record that the arm has ended."""


class TensorBoard:
    """Event files in a folder for each arm; raises OSError."""

    def __init__(self, folder: str, arm: Arm, app: str) -> None:
        from tensorboard.summary import Writer  # which needs neither TensorFlow nor torch

        self._writer = Writer(str(Path(folder, arm.run_dir.parent.name, arm.run_dir.name)))

    def record(self, server_round: int, numbers: Mapping[str, float]) -> None:
        """Write a scalar for each number."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, server_round)
        self._writer.flush()

    def end(self, *, completed: bool) -> None:
        """Close the file."""
        self._writer.close()


class MLflow:
    """A run for each arm, in an experiment named after the app; raises MlflowException."""

    def __init__(self, uri: str, arm: Arm, app: str) -> None:
        for name, value in _PATIENCE.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(tracking_uri=uri), Metric
        path = arm.run_dir / MLFLOW_RUN
        if path.exists():
            self._run = path.read_text()
            self._client.update_run(self._run, status="RUNNING")
            return
        known = self._client.get_experiment_by_name(app)
        experiment = known.experiment_id if known else self._client.create_experiment(app)
        name = f"{arm.run_dir.parent.name}/{arm.run_dir.name}"
        self._run = self._client.create_run(experiment, run_name=name).info.run_id
        self._client.log_batch(self._run, params=[Param(key, str(value)) for key, value in arm.config.items()])
        path.write_text(self._run)

    def record(self, server_round: int, numbers: Mapping[str, float]) -> None:
        """Log a metric for each number."""
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, server_round) for name, value in numbers.items()]
        self._client.log_batch(self._run, metrics=metrics)

    def end(self, *, completed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self._run, "FINISHED" if completed else "FAILED")


TRACKERS: Final[Mapping[str, Callable[[str, Arm, str], Tracker]]] = {"tensorboard": TensorBoard, "mlflow": MLflow}
"""Trackers by name, which is also that of the package, of fedkit's extra, and of the option."""


def check_trackers(targets: Mapping[str, str]) -> dict[str, str]:
    """Return where each tracker writes, folders made absolute.

    Raises
    ------
    ConfigError
        If its package is not installed.
    """
    for name in targets:
        if find_spec(name) is None:
            raise ConfigError(f"--{name}: expected the package {name}, got none. pip install 'fedkit[{name}]'.")
    return {
        name: str(Path(target).resolve()) if name == "tensorboard" else target for name, target in targets.items()
    }


@contextmanager
def tracking(arm: Arm, app: str, targets: Mapping[str, str]) -> Iterator[Callable[[Row], None]]:
    """Yield a callable that passes the rounds of an arm to the trackers; `targets`: where each of them writes.

    Raises
    ------
    LaunchError
        If a tracker cannot start.
    """
    trackers: dict[str, Tracker] = {}
    for name, target in targets.items():
        arm.run_dir.mkdir(parents=True, exist_ok=True)
        try:
            trackers[name] = TRACKERS[name](target, arm, app)
        except Exception as error:  # whatever the package raises
            raise LaunchError(f"--{name}: cannot write to {target}: {error}") from error

    def each(do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(trackers.items()):
            try:
                do(tracker)
            except Exception as error:
                del trackers[name]
                logger.warning("%s is given up, the run goes on: %s", name, error)

    def on_round(row: Row) -> None:
        found = numbers_of(row)
        each(lambda tracker: tracker.record(row["round"], found))

    completed = False
    try:
        yield on_round
        completed = True
    finally:
        each(lambda tracker: tracker.end(completed=completed))


def numbers_of(row: Row) -> dict[str, float]:
    """Return the numbers of a round by name, except the round's own; those of training as ``train/NAME``."""
    inside: Mapping[str, Any] = row.get(TRAIN) or {}
    every = {**row, **{f"{TRAIN}/{key}": value for key, value in inside.items()}}
    return {
        key: float(value)
        for key, value in every.items()
        if key != "round" and isinstance(value, int | float) and not isinstance(value, bool)
    }
