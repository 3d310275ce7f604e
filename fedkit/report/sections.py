"""The tables of a page: the summary, missing clients, the ledger, predictions, settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .figures import format_bytes, format_metric, format_times, summarise, times_less, total
from .heat import natural
from .markup import Markup, folded, joined, table, tag
from .plots import swatch
from .reading import UNFINISHED, ArmRecord
from .series import Series
from .tables import absences

DASH: Final = "–"


def summary(series: Sequence[Series]) -> Markup:
    """Return the strategies side by side, means over seeds."""
    references = [one.label for one in series if any(arm.reference for arm in one.arms)]
    reference = references[0] if len(references) == 1 else None  # several runs have one each
    runs = {one.label: [arm.rows for arm in one.begun or one.arms] for one in series}
    compared = summarise(runs, reference)
    found, metric = compared["strategies"], compared["metric"]
    written = _percent if metric == "accuracy" else format_metric
    others = ["fp32", *([reference] if reference else [])]
    rows = []
    for one in series:
        row = found[one.label]
        name = tag(
            "label",
            tag("input", type="checkbox", checked="", data_toggle=one.number),
            swatch(one.number),
            one.label,
        )
        times = [format_times(row[f"times-less-uplink-than-{other}"]) for other in others]
        seconds = [float(arm.rows[-1].get("seconds", 0)) for arm in one.begun]
        rows.append(
            [
                name,
                len(one.begun),
                written(row[f"{metric}-mean"], row[f"{metric}-std"]),
                format_bytes(row["uplink-bytes"]),
                format_bytes(row["downlink-bytes"]),
                *times,
                *(sum(total(arm.rows, key) for arm in one.arms) for key in ("skips", "missing", "rejected")),
                f"{sum(seconds) / len(seconds):.0f} s" if seconds else DASH,
            ]
        )
    heads = ["strategy", "seeds", metric, "uplink", "downlink", *(f"less than {other}" for other in others)]
    return table(
        [*heads, "skips", "missing", "rejected", "time"],
        rows,
        f"{metric.capitalize()}: last three rounds. Means over seeds; skips, missing and rejected are sums",
    )


def states(arms: Sequence[ArmRecord]) -> Markup:
    """Return the arms that are not completed, and how far each got; empty if all are."""
    items = []
    for arm in arms:
        if arm.status not in UNFINISHED:
            continue
        wanted, done = arm.config.get("num-rounds", "?"), arm.rows[-1]["round"] if arm.rows else 0
        items.append(tag("li", f"{arm.title} ({arm.run}) {UNFINISHED[arm.status]}: {done} of {wanted} rounds."))
    if not items:
        return Markup("")
    told = tag("strong", "Not finished: what is shown is what there is so far.")
    return tag("div", told, tag("ul", *items), class_="warning", role="note")


def missing(arm: ArmRecord) -> Markup | None:
    """Return the clients that were missing, and their stand-ins; None if there are none."""
    rows = sorted(absences(arm.rows), key=lambda row: natural(row[0]))
    heads = ["client", "rounds", "missing in", "stood in for it"]
    found = table(heads, rows, f"Missing clients, {arm.title}")
    return tag("div", found, class_="missing") if rows else None


def ledger(series: Sequence[Series]) -> Markup:
    """Return the bytes by direction, from the ideal bits to the socket; means over seeds."""
    heads = [
        "strategy",
        "ideal",
        "frames",
        "all objects",
        "besides frames",
        "on the socket",
        "messages",
        "objects",
    ]
    rows = [
        [joined([swatch(one.number), f"{one.label}, {direction}"]), *_directed(one, direction)]
        for one in series
        for direction in ("uplink", "downlink")
    ]
    caption = "Mean over seeds; besides frames: below 0 where Flower sends equal arrays of a message once"
    return table(heads, rows, caption)


def _directed(one: Series, direction: str) -> list[str]:
    def mean(key: str) -> float:
        return sum(total(arm.rows, f"{direction}-{key}") for arm in one.begun) / max(1, len(one.begun))

    ideal, frames, objects = mean("ideal-bytes"), mean("frame-bytes"), mean("bytes")
    socket = sum(total(arm.rows, f"socket-{direction}-bytes") for arm in one.begun) / max(1, len(one.begun))
    counts: Counter[str] = Counter()
    with_ledger = [arm for arm in one.arms if arm.entries]
    for entry in (entry for arm in with_ledger for entry in arm.entries if entry["direction"] == direction):
        counts.update(messages=1, objects=entry["objects"])
    number = [f"{counts[key] / len(with_ledger):.0f}" if with_ledger else DASH for key in ("messages", "objects")]
    besides = f"{100 * (objects - frames) / objects:.1f} %" if objects else DASH
    sizes = [format_bytes(size) if size else DASH for size in (ideal, frames, objects)]
    return [*sizes, besides, format_bytes(socket) if socket else DASH, *number]


def forecasts(series: Sequence[Series]) -> Markup | None:
    """Return predictions beside measurements, over the rounds that have both; None without predictions."""
    rows = []
    for one in series:
        for arm in one.arms:
            known = {row["round"]: row for row in arm.forecast.get("rounds", ())}
            done = [row for row in arm.rows if row["round"] and row["round"] in known]
            skips = ["skips"] if arm.forecast.get("trained") else []  # else skips were not predicted
            for key in ("uplink-bytes", "downlink-bytes", "missing", *skips) if done else ():
                told, found = total([known[row["round"]] for row in done], key), total(done, key)
                ratio = times_less(told, found)
                percent = f"{100 * (ratio - 1):+.1f} %".replace("-0.0", "+0.0") if ratio else DASH
                written, off = (format_bytes, percent) if key.endswith("bytes") else (str, f"{told - found:+d}")
                name = joined([swatch(one.number), f"{arm.title}, {key.removesuffix('-bytes')}"])
                rows.append([name, written(told), written(found), off])
    heads = ["", "predicted", "measured", "off by"]
    return table(heads, rows, "What fedkit plan expected, over the rounds that were run") if rows else None


def settings(series: Sequence[Series]) -> list[Markup]:
    """Return the settings in which the series differ, and all others folded."""
    configs = [one.arms[0].config for one in series]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    own = {"run-dir", "seed", "strategy"}
    differ = [k for k in keys if k not in own and len({repr(config.get(k)) for config in configs}) > 1]
    labels = [one.label for one in series]

    def of(chosen: Sequence[str]) -> list[list[Any]]:
        return [[key, *(_written(config.get(key)) for config in configs)] for key in chosen]

    shown = [table(["run config", *labels], of(differ), "What differs")] if differ else []
    rest = table(["run config", *labels], of([k for k in keys if k not in own]), "Run config") if keys else None
    about = [_about(arm) for one in series for arm in one.arms]
    versions = table(["arm", "status", "started", "finished", "fedkit", "flwr", "python", "commit"], about, "Arms")
    return [*shown, folded("All settings and versions", *([rest] if rest else []), versions)]


def _about(arm: ArmRecord) -> list[str]:
    versions: Mapping[str, str] = arm.about.get("versions", {})
    commit = (arm.about.get("git-commit") or DASH)[:10]
    times = [str(arm.about.get(key) or DASH) for key in ("started", "finished")]
    names = [versions.get(name, DASH) for name in ("fedkit", "flwr", "python")]
    return [f"{arm.title} ({arm.run})", arm.status or DASH, *times, *names, commit]


def _percent(mean: float | None, std: float | None) -> str:
    if mean is None:
        return DASH
    return f"{100 * mean:.1f} %" if std is None else f"{100 * mean:.1f} ± {100 * std:.1f} %"


def _written(value: object) -> str:
    return DASH if value is None else str(value)
