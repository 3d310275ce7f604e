"""Tables and lines about a run, for a terminal."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from .figures import (
    FINAL_ROUNDS,
    Row,
    final_value,
    format_bytes,
    format_metric,
    format_times,
    judged_by,
    times_less,
    total,
)

MAX_ROWS = 25


def thin_out(rows: Sequence[Row], limit: int = MAX_ROWS) -> list[Row]:
    """Return every k-th row, with the smallest k that leaves at most `limit`, and always the last."""
    step = -(-len(rows) // limit) or 1
    kept = list(rows[::step])
    if rows and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    return kept


def news(rows: Sequence[Row]) -> str:
    """Return the state of a run: the latest metric, and bytes, skips and missing replies so far."""
    metric = judged_by(rows)
    values = [row[metric] for row in rows if row.get(metric) is not None]
    return (
        f"{metric} {format_metric(values[-1] if values else None)}  "
        f"up {format_bytes(total(rows, 'uplink-bytes'))}  "
        f"down {format_bytes(total(rows, 'downlink-bytes'))}  "
        f"skips {total(rows, 'skips')}  missing {total(rows, 'missing')}{_rejected(rows)}"
    )


def _rejected(rows: Sequence[Row]) -> str:
    return f"  rejected {count}" if (count := total(rows, "rejected")) else ""


def round_table(rows: Sequence[Row], title: str) -> Table:
    """Return the table of a run: bytes and counts of each round, and the saving so far."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "so far: uplink up to this round, and how many times less that is than in fp32"
    counts = ["skips", "missing", *(["rejected"] if total(rows, "rejected") else [])]
    metric = judged_by(rows)
    for name in ("round", metric, "uplink", "downlink", *counts, "so far", "vs fp32"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in thin_out(rows):
        so_far = [each for each in rows if each["round"] <= row["round"]]
        sent = total(so_far, "uplink-bytes")
        table.add_row(
            str(row["round"]),
            format_metric(row.get(metric)),
            format_bytes(total([row], "uplink-bytes")),
            format_bytes(total([row], "downlink-bytes")),
            *(str(total([row], name)) for name in counts),
            format_bytes(sent),
            format_times(times_less(total(so_far, "fp32-bytes"), sent)),
        )
    return table


def missing_table(rows: Sequence[Row]) -> Table | None:
    """Return the table of missing clients, with the rounds and stand-ins; None if there are none."""
    found = absences(rows)
    if not found:
        return None
    table = Table(title="Missing clients", title_justify="left")
    for heading in ("client", "rounds", "missing in", "stood in for it"):
        table.add_column(heading, justify="right" if heading == "rounds" else "left")
    for line in found:
        table.add_row(*line)
    return table


def refusals(rows: Sequence[Row]) -> list[tuple[int, str]]:
    """Return why replies were refused, and how often each reason was given, the most frequent first."""
    reasons = Counter(reason for row in rows for reason in row.get("refused", {}).values())
    return [(times, reason) for reason, times in reasons.most_common()]


def refused_lines(rows: Sequence[Row], most: int = 3) -> list[str]:
    """Return one line for each of the most frequent reasons."""
    return [
        f"{times} {'reply' if times == 1 else 'replies'} refused: {reason}"
        for times, reason in refusals(rows)[:most]
    ]


def absences(rows: Sequence[Row]) -> list[tuple[str, str, str, str]]:
    """Return for each missing client its name, the number of rounds, the rounds, and its stand-ins."""
    rounds: dict[str, list[int]] = {}
    by: dict[str, Counter[str]] = {}
    for row in rows:
        for client in row.get("missing-clients", ()):
            rounds.setdefault(client, []).append(row["round"])
            kin = row.get("stand-ins", {}).get(client)
            name = "nobody" if kin is None else "its last update" if kin == client else f"client {kin}"
            by.setdefault(client, Counter())[name] += 1
    return [
        (
            client,
            str(len(rounds[client])),
            _ranges(rounds[client]),
            ", ".join(f"{name} {times}×" for name, times in by[client].most_common()),
        )
        for client in sorted(rounds)
    ]


def _ranges(numbers: Sequence[int]) -> str:
    """Return ascending whole numbers as ranges: ``2-4, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def totals_line(rows: Sequence[Row]) -> str:
    """Return a one-line summary of a run."""
    metric, up, down = judged_by(rows), total(rows, "uplink-bytes"), total(rows, "downlink-bytes")
    saving = format_times(times_less(total(rows, "fp32-bytes"), up))
    seconds = float(rows[-1].get("seconds", 0.0)) if rows else 0.0
    return (
        f"{metric} {format_metric(final_value(rows, metric))} (mean of last {FINAL_ROUNDS})  "
        f"uplink {format_bytes(up)}, {saving} less than fp32  "
        f"downlink {format_bytes(down)}  skips {total(rows, 'skips')}  missing {total(rows, 'missing')}"
        f"{_rejected(rows)}  {seconds:.1f} s"
    )


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return the table of `summarise`'s result, one row per strategy."""
    compare, metric = summary["compare"], summary["metric"]
    table = Table(title="Summary, mean over seeds", title_justify="left", caption_justify="left")
    table.caption = "vs: how many times less uplink"
    table.add_column("strategy", no_wrap=True)
    others = ["fp32", *([compare] if compare else [])]
    for name in ("seeds", metric, "uplink", "downlink", *(f"vs {name}" for name in others)):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in summary["strategies"].items():
        table.add_row(
            name,
            str(row["seeds"]),
            format_metric(row[f"{metric}-mean"], row[f"{metric}-std"]),
            format_bytes(row["uplink-bytes"]),
            format_bytes(row["downlink-bytes"]),
            *(format_times(row[f"times-less-uplink-than-{other}"]) for other in others),
        )
    return table
