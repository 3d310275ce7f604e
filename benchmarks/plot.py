"""The plot of `benchmarks.codec`: error against bits, fedkit's codecs bold, each curve labelled at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import MISSING, Row
from benchmarks.ours import MAIN, OURS
from benchmarks.peers import PEERS
from benchmarks.peers.base import require

MOST_BITS, SMALLEST = 6.0, 3e-4
HIDDEN = (  # other curves stand for these
    "EDEN, padded as published (transcribed)",
    "DRIVE (transcribed)",
    "QSGD, maximum (transcribed)",
    *(peer.name for peer in OURS if peer.name != MAIN),
)
GAP = 1 / 18  # between two labels, of the picture's height
OURS_COLOR, PEER_COLORS = "#c0182b", ("#1f6fb4", "#2a8f4f", "#7b52ab", "#b36a00", "#0f8f9a", "#8c564b", "#5a5f66")


def plot(figures: Mapping[str, tuple[Sequence[Row], Row]], path: Path) -> None:
    """Write one panel for each app; the file's name says which format."""
    pyplot = require("matplotlib.pyplot", "matplotlib")
    pyplot.rcParams.update({"font.size": 9, "svg.fonttype": "none", "axes.spines.top": False})
    figure, panels = pyplot.subplots(1, len(figures), figsize=(7.2 * len(figures), 5.4), squeeze=False)
    for panel, (app, (rows, bound)) in zip(panels[0], figures.items(), strict=True):
        _panel(panel, rows, bound)
        panel.set_title(f"Innovations of {app}", loc="left", fontweight="bold")
    panels[0][0].set_ylabel("error, ‖x − x̂‖² / ‖x‖²")
    figure.tight_layout()
    figure.savefig(path, dpi=110, facecolor="white")
    pyplot.close(figure)


def _panel(panel: Any, rows: Sequence[Row], bound: Row) -> None:
    panel.set(yscale="log", xlim=(0, MOST_BITS), ylim=(SMALLEST, 1.3), xlabel="real bits per value")
    panel.spines["right"].set_visible(False)
    panel.grid(True, which="major", color="#e8e8e8", linewidth=0.6)
    panel.plot(bound["rates"], bound["gaussian"], color="#888888", linewidth=1, linestyle=":")
    panel.fill_between(bound["rates"], bound["empirical"], 1e-9, color="#eeeeee", linewidth=0)
    ends: list[tuple[float, float, str, dict[str, Any]]] = [
        _end(bound["rates"], bound["gaussian"], "Gaussian D(R)", {"color": "#888888"}),
        _end(bound["rates"], bound["empirical"], "empirical D(R): below it, nothing", {"color": "#888888"}),
    ]
    for number, peer in enumerate((*OURS, *PEERS)):
        found = sorted(_points(rows, peer.name))
        if not found or peer.name in HIDDEN:
            continue
        ours = peer in OURS
        style: dict[str, Any] = {
            "color": PEER_COLORS[number % len(PEER_COLORS)],
            "linewidth": 1,
            "marker": ".",
            "alpha": 0.9,
        }
        if ours:
            style |= {"color": OURS_COLOR, "linewidth": 2.6 if peer.name == MAIN else 1.4, "zorder": 5}
        bits, errors = zip(*found, strict=True)
        panel.plot(bits, errors, **style)
        weight = "bold" if ours else "normal"
        ends.append(_end(bits, errors, peer.name, {"color": style["color"], "fontweight": weight}))
    _label(panel, ends)


def _points(rows: Sequence[Row], name: str) -> list[tuple[float, float]]:
    found = [(r["bits"], r["error"]) for r in rows if r["codec"] == name and MISSING not in r]
    return [(bits, error) for bits, error in found if bits <= MOST_BITS and SMALLEST < error < 1.3]


def _end(
    bits: Sequence[float], errors: Sequence[float], text: str, style: dict[str, Any]
) -> tuple[float, float, str, dict[str, Any]]:
    """Return where a curve leaves the picture, and what to write there."""
    inside = [(b, e) for b, e in zip(bits, errors, strict=True) if b <= MOST_BITS and e >= SMALLEST]
    return (*inside[-1], text, style)


def _label(panel: Any, ends: list[tuple[float, float, str, dict[str, Any]]]) -> None:
    """Write the labels right of the picture, each as near the height of its curve's end as there is room."""
    span = math.log(1.3 / SMALLEST)
    free = 1.0
    for bits, error, text, style in sorted(ends, key=lambda end: -end[1]):
        below = sum(other < error for _, other, _, _ in ends)
        height = max(min(math.log(error / SMALLEST) / span, free), below * GAP)
        free = height - GAP
        panel.annotate(
            text.replace(" (transcribed)", ""),
            (bits, error),
            xytext=(1.05, height),
            textcoords="axes fraction",
            va="center",
            arrowprops={"arrowstyle": "-", "color": style["color"], "linewidth": 0.5, "alpha": 0.7},
            **style,
        )
