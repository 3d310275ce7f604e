"""The arms of a page, by run and strategy, as curves: mean, lowest and highest value over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from .figures import METRICS, Row, judged_by
from .reading import ArmRecord


class Point(NamedTuple):
    """A value in one round, over the seeds that have it."""

    server_round: int
    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Series:
    """Arms that differ only in their seed."""

    number: int  # of its colour
    label: str
    arms: Sequence[ArmRecord]

    @property
    def begun(self) -> Sequence[ArmRecord]:
        """The arms that have recorded a round."""
        return [arm for arm in self.arms if arm.rows]

    def curve(self, key: str) -> list[Point]:
        """Return a number, over seeds, for each round that has it; `key` as in `number`."""
        found: dict[int, list[float]] = {}
        for arm in self.arms:
            for row in arm.rows:
                if (here := number(row, key)) is not None:
                    found.setdefault(row["round"], []).append(here)
        return [Point(k, statistics.fmean(found[k]), min(found[k]), max(found[k])) for k in sorted(found)]

    def so_far(self, *keys: str) -> dict[int, float]:
        """Return the sum of some counts up to each round, the mean over the seeds that reached it."""
        found: dict[int, list[float]] = {}
        for arm in self.arms:
            total = 0.0
            for row in arm.rows:
                total += sum(float(row.get(key, 0)) for key in keys)
                found.setdefault(row["round"], []).append(total)
        return {k: statistics.fmean(totals) for k, totals in found.items()}


def group(arms: Sequence[ArmRecord]) -> list[Series]:
    """Return the arms by run and strategy, in the order in which they come."""
    by: dict[tuple[str, str], list[ArmRecord]] = {}
    for arm in arms:
        by.setdefault((str(arm.folder.parent), arm.strategy), []).append(arm)
    runs: dict[str, set[tuple[str, str]]] = {}
    for run, strategy in by:
        runs.setdefault(strategy, set()).add((run, strategy))
    return [
        Series(k, strategy if len(runs[strategy]) == 1 else f"{strategy} ({members[0].run})", members)
        for k, ((_, strategy), members) in enumerate(by.items())
    ]


def number(row: Row, key: str) -> float | None:
    """Return a number of a round, or None; ``train/KEY`` for what its clients measured in training."""
    where, _, name = key.rpartition("/")
    value = (row.get(where, {}) if where else row).get(name)
    return float(value) if isinstance(value, int | float) and value == value else None


def measured(series: Sequence[Series]) -> list[str]:
    """Return the keys, as in `number`, of measurements other than the quality and the ledger's counts."""
    rows = [row for one in series for arm in one.arms for row in arm.rows]
    keys = [key for key in METRICS if key != judged_by(rows)] + ["train/train-loss", "train/loss"]
    keys += sorted({f"train/{key}" for row in rows for key in row.get("train", {}) if "effective-rank" in key})
    keys += sorted({key for row in rows for key in row if "effective-rank" in key})
    keys += ["ari", "purity"]
    return [key for key in keys if any(number(row, key) is not None for row in rows)]
