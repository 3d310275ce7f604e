"""The plot of `benchmarks.safari`: accuracy against the share of lost replies, a panel for each task."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.harness import Row
from benchmarks.peers.base import require

COLORS = {"safari": "#c0182b", "mifa": "#1f6fb4", "reweight": "#2a8f4f", "drop": "#5a5f66"}
PLACES = {"bursts, 40 %": 110, "bursts, 80 %": 135, "biased": 160}  # where conditions stand that are no shares
PERFECT = "perfect link"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Write one panel for each task that loses replies; the file's name says which format."""
    pyplot = require("matplotlib.pyplot", "matplotlib")
    pyplot.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False})
    tasks = list(dict.fromkeys(row["task"] for row in rows if row["arm"] != PERFECT))
    figure, panels = pyplot.subplots(1, len(tasks), figsize=(6.4 * len(tasks), 4.4), squeeze=False, sharey=True)
    for panel, task in zip(panels[0], tasks, strict=True):
        _panel(panel, [row for row in rows if row["task"] == task])
        panel.set_title(task, loc="left", fontweight="bold")
    panels[0][0].set_ylabel("accuracy, %, mean of the last 10 rounds")
    panels[0][-1].legend(frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)


def _panel(panel: Any, rows: Sequence[Row]) -> None:
    perfect = [100 * row["final"] for row in rows if row["arm"] == PERFECT]
    if perfect:
        panel.axhline(mean(perfect), color="#888888", linewidth=1, linestyle=":", label=PERFECT)
    ticks: dict[int, str] = {}
    for arm, color in COLORS.items():
        points: dict[int, list[float]] = {}
        for row in (row for row in rows if row["arm"] == arm):
            at = PLACES.get(row["condition"]) or int(row["condition"].split()[0])
            ticks[at] = row["condition"]
            points.setdefault(at, []).append(100 * row["final"])
        shares = sorted(at for at in points if at <= 100)
        style = {"color": color, "linewidth": 2.4 if arm == "safari" else 1.2, "marker": "o", "markersize": 4}
        panel.plot(shares, [mean(points[at]) for at in shares], label=arm, **style)
        others = [at for at in points if at > 100]
        panel.plot(others, [mean(points[at]) for at in others], **(style | {"linestyle": "none"}))
        for at, values in points.items():
            panel.vlines(at, min(values), max(values), color=color, linewidth=0.8)
    panel.set_xticks(sorted(ticks), [ticks[at].replace(", ", ",\n") for at in sorted(ticks)])
    panel.spines["right"].set_visible(False)
    panel.grid(True, axis="y", color="#e8e8e8", linewidth=0.6)
    panel.set_xlabel("replies lost")
