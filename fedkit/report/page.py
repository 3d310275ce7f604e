"""A self-contained HTML page about runs: it needs no network, library or font."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Final

from . import sections
from .clusters import cluster_map
from .curves import measured_plots, quality_plots, traffic_plots
from .figures import judged_by
from .heat import heat_legend, heat_map
from .markup import Markup, folded, joined, tag
from .reading import ArmRecord, read_arms
from .series import Series, group

NO_LEDGER: Final = (
    "The ledger with each client's messages is where the server runs, in its FEDKIT_RUNS_DIR, or the app records "
    "none. Give that folder to `fedkit report` too, and it is shown here."
)


def write_page(folders: Sequence[Path], out: Path) -> None:
    """Write the page of some runs.

    Raises
    ------
    ConfigError
        If a folder holds no run.
    OSError
        If the page cannot be written.
    """
    text = page(read_arms(folders))
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(text, encoding="utf-8")


def page(arms: Sequence[ArmRecord]) -> str:
    """Return the page about some arms."""
    series = group(arms)
    here = files(__package__)
    apps = list(dict.fromkeys(str(arm.about["app"]) for arm in arms if "app" in arm.about))
    title = ", ".join(apps) or ", ".join(dict.fromkeys(arm.run for arm in arms))
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
    runs = ", ".join(dict.fromkeys(arm.run for arm in arms))
    parts = {name: (here / f"page.{name}").read_text(encoding="utf-8") for name in ("html", "css", "js")}
    return Template(parts["html"]).substitute(
        title=joined([title]),
        about=joined([f"{runs} · fedkit {version('fedkit')} · {now}"]),
        style=parts["css"],
        script=parts["js"],
        body=joined(_body(arms, series)),
    )


def _body(arms: Sequence[ArmRecord], series: Sequence[Series]) -> list[Markup]:
    """Return the sections that have something to show."""
    forecasts = sections.forecasts(series)
    clusters = [
        folded(arm.title, found, open_=k == 0)
        for k, arm in enumerate(arms)
        if (found := cluster_map(arm, f"map-{k}")) is not None
    ]
    learning = measured_plots(series)
    metric = judged_by(row for arm in arms for row in arm.rows)
    quality = _grid(quality_plots(series, metric)) or _none("No accuracy, perplexity or loss was recorded.")
    return [
        sections.states(arms),
        _section("Summary", "", sections.summary(series)),
        _section(metric.capitalize(), _over(series), quality),
        _section("Traffic", "", _grid(traffic_plots(series)), *([forecasts] if forecasts else [])),
        _section("Clients", "Bytes that each client sent up in each round.", *_clients(series)),
        *([_section("Clusters", "Which adapters were averaged with each other.", *clusters)] if clusters else []),
        *([_section("Learning", "", _grid(learning))] if learning else []),
        _section(
            "Ledger",
            "What was sent: in bits that an ideal coder needs, in frames, and in all.",
            sections.ledger(series),
        ),
        _section("Settings", "", *sections.settings(series)),
    ]


def _clients(series: Sequence[Series]) -> list[Markup]:
    """Return what clients sent, and which were missing; the first seed of each series is unfolded."""
    parts: list[Markup] = []
    for one in series:
        for k, arm in enumerate(one.arms):
            heat, missing = heat_map(arm), sections.missing(arm)
            shown = [
                part
                for part in (heat or _none(NO_LEDGER if arm.rows else "Nothing yet."), missing)
                if part is not None
            ]
            title = f"{one.label}, seed {arm.seed}" if arm.seed else one.label
            parts.append(folded(title, tag("div", *shown, class_="sides"), open_=k == 0))
    return [heat_legend(), *parts]


def _over(series: Sequence[Series]) -> str:
    """Return the explanation of the bands, if there are several seeds."""
    if all(len(one.arms) == 1 for one in series):
        return ""
    return "Lines are means over seeds, bands go from the lowest to the highest seed."


def _section(title: str, about: str, *children: Markup) -> Markup:
    lead = tag("p", about) if about else Markup("")
    return tag("section", tag("h2", title), lead, *children)


def _grid(plots: Sequence[Markup]) -> Markup:
    return tag("div", *plots, class_="plots") if plots else Markup("")


def _none(text: str) -> Markup:
    return tag("p", text, class_="note")
