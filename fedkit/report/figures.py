"""The figures of a run, from `rounds.jsonl`: totals, tables and the summary over seeds.

A server writes one JSON object per round. `round` is required; `accuracy` and `loss` may be absent in
rounds without an evaluation, and every count that is absent reads as 0.

Two numbers need their definition. *Final accuracy* is the mean over the last three evaluated rounds,
which damps the noise of small test sets; round 0, before training, never counts. *Times less* is the
bytes of another run divided by the bytes of this one, so "20x" means one twentieth of the traffic; "than
fp32" compares with `fp32-bytes`, what sending the adapter in fp32 for every asked client would have cost
in the same rounds, in one direction.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Row: TypeAlias = Mapping[str, Any]
"""One round as the server recorded it."""

FINAL_ROUNDS = 3
METRICS = ("accuracy", "perplexity", "loss")  # what a run is judged by: the first of these that it measured


def read_rounds(path: Path) -> list[Row]:
    """Return the recorded rounds, in order of round; empty if the file does not exist yet.

    A line that is not a complete record is skipped: a server that was killed leaves a torn last line,
    and the one that resumes appends to it. A round that was recorded twice counts once, as last written.
    """
    rows: dict[int, Row] = {}
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and isinstance(row.get("round"), int):
            rows[row["round"]] = row
    return [rows[number] for number in sorted(rows)]


def total(rows: Sequence[Row], key: str) -> int:
    """Return the sum of `key` over `rows`."""
    return sum(int(row.get(key, 0)) for row in rows)


def judged_by(rows: Iterable[Row]) -> str:
    """Return the metric that a run is judged by: of `METRICS`, the first that a round has; else "accuracy"."""
    found = {metric for row in rows for metric in METRICS if row.get(metric) is not None}
    return next((metric for metric in METRICS if metric in found), METRICS[0])


def final_value(rows: Sequence[Row], metric: str) -> float | None:
    """Return the mean of a metric over the last three evaluated rounds, None if none was evaluated."""
    values = [float(row[metric]) for row in rows if row["round"] and row.get(metric) is not None]
    return statistics.fmean(values[-FINAL_ROUNDS:]) if values else None


def times_less(other: float, own: float) -> float | None:
    """Return how many times smaller `own` is than `other`; None where either is 0."""
    return other / own if other and own else None


def format_bytes(count: float) -> str:
    """Return a byte count in decimal units.

    >>> format_bytes(768), format_bytes(1_234_567)
    ('768 B', '1.23 MB')
    """
    if count < 1000:
        return f"{count:.0f} B"
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:.3g} {'kMGT'[power - 1]}B"


def format_metric(value: float | None, std: float | None = None) -> str:
    """Return a metric with four decimals, with its standard deviation if there is one."""
    if value is None:
        return "-"
    return f"{value:.4f}" if std is None else f"{value:.4f} ± {std:.4f}"


def format_times(value: float | None) -> str:
    """Return a ratio as in "12.3x", a dash for None."""
    return "-" if value is None else f"{value:.1f}x"


def summarise(runs: Mapping[str, Sequence[Sequence[Row]]], compare: str | None = None) -> dict[str, Any]:
    """Return the comparison of strategies as plain JSON values.

    Parameters
    ----------
    runs
        Strategy name to its runs, one per seed, each a list of rows.
    compare
        The strategy that the others are compared with, a key of `runs`.

    Returns
    -------
    dict
        `compare` and `strategies`: for each its number of `seeds`, the mean and sample standard
        deviation over seeds of the final accuracy (no deviation for one seed), the mean over seeds of
        the bytes in each direction, and how many times less uplink it used than fp32 and than `compare`.
    """
    metric = judged_by(row for seeds in runs.values() for rows in seeds for row in rows)
    strategies: dict[str, Any] = {}
    for name, seeds in runs.items():
        values = [value for rows in seeds if (value := final_value(rows, metric)) is not None]
        uplink, downlink, fp32 = (
            statistics.fmean(total(rows, key) for rows in seeds)
            for key in ("uplink-bytes", "downlink-bytes", "fp32-bytes")
        )
        strategies[name] = {
            "seeds": len(seeds),
            f"{metric}-mean": statistics.fmean(values) if values else None,
            f"{metric}-std": statistics.stdev(values) if len(values) > 1 else None,
            "uplink-bytes": uplink,
            "downlink-bytes": downlink,
            "times-less-uplink-than-fp32": times_less(fp32, uplink),
        }
    if compare is not None:
        reference = strategies[compare]["uplink-bytes"]
        for row in strategies.values():
            row[f"times-less-uplink-than-{compare}"] = times_less(reference, row["uplink-bytes"])
    return {"compare": compare, "metric": metric, "strategies": strategies}
