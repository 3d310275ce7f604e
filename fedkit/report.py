"""What happened in a run, from `rounds.jsonl`: totals, tables and the summary over seeds.

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
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from rich.table import Table

Row: TypeAlias = Mapping[str, Any]
"""One round as the server recorded it."""

MAX_ROWS = 25
FINAL_ROUNDS = 3


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


def final_accuracy(rows: Sequence[Row]) -> float | None:
    """Return the mean accuracy of the last three evaluated rounds, None if none was evaluated."""
    values = [float(row["accuracy"]) for row in rows if row["round"] and row.get("accuracy") is not None]
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


def format_accuracy(value: float | None, std: float | None = None) -> str:
    """Return an accuracy with four decimals, with its standard deviation if there is one."""
    if value is None:
        return "-"
    return f"{value:.4f}" if std is None else f"{value:.4f} ± {std:.4f}"


def format_times(value: float | None) -> str:
    """Return a ratio as in "12.3x", a dash for None."""
    return "-" if value is None else f"{value:.1f}x"


def thin_out(rows: Sequence[Row], limit: int = MAX_ROWS) -> list[Row]:
    """Return every k-th row, with the smallest k that leaves at most `limit`, and always the last."""
    step = -(-len(rows) // limit) or 1
    kept = list(rows[::step])
    if rows and kept[-1] is not rows[-1]:
        kept.append(rows[-1])
    return kept


def news(rows: Sequence[Row]) -> str:
    """Return where a run stands: the latest accuracy, and the bytes and lost replies so far."""
    accuracies = [row["accuracy"] for row in rows if row.get("accuracy") is not None]
    return (
        f"accuracy {format_accuracy(accuracies[-1] if accuracies else None)}  "
        f"up {format_bytes(total(rows, 'uplink-bytes'))}  "
        f"down {format_bytes(total(rows, 'downlink-bytes'))}  "
        f"skips {total(rows, 'skips')}  missing {total(rows, 'missing')}"
    )


def round_table(rows: Sequence[Row], title: str) -> Table:
    """Return the table of a run: bytes and counts of each round, and the saving up to it."""
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.caption = "so far: uplink up to this round, and how many times less that is than in fp32"
    counts = ["skips", "missing"]
    for name in ("round", "accuracy", "uplink", "downlink", *counts, "so far", "vs fp32"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in thin_out(rows):
        so_far = [each for each in rows if each["round"] <= row["round"]]
        sent = total(so_far, "uplink-bytes")
        table.add_row(
            str(row["round"]),
            format_accuracy(row.get("accuracy")),
            format_bytes(total([row], "uplink-bytes")),
            format_bytes(total([row], "downlink-bytes")),
            *(str(total([row], name)) for name in counts),
            format_bytes(sent),
            format_times(times_less(total(so_far, "fp32-bytes"), sent)),
        )
    return table


def missing_table(rows: Sequence[Row]) -> Table | None:
    """Return the table of the clients that were missing: in which rounds, and who stood in; None: nobody was."""
    rounds: dict[str, list[int]] = {}
    by: dict[str, Counter[str]] = {}
    for row in rows:
        for client in row.get("missing-clients", ()):
            rounds.setdefault(client, []).append(row["round"])
            kin = row.get("stand-ins", {}).get(client)
            name = "nobody" if kin is None else "its last update" if kin == client else f"client {kin}"
            by.setdefault(client, Counter())[name] += 1
    if not rounds:
        return None
    table = Table(title="Missing clients", title_justify="left")
    for heading in ("client", "rounds", "missing in", "stood in for it"):
        table.add_column(heading, justify="right" if heading == "rounds" else "left")
    for client in sorted(rounds):
        stood_in = ", ".join(f"{name} {times}×" for name, times in by[client].most_common())
        table.add_row(client, str(len(rounds[client])), _ranges(rounds[client]), stood_in)
    return table


def _ranges(numbers: Sequence[int]) -> str:
    """Return whole numbers, ascending, in short: ``2-4, 7``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def totals_line(rows: Sequence[Row]) -> str:
    """Return one line that sums a run up."""
    up, down = total(rows, "uplink-bytes"), total(rows, "downlink-bytes")
    saving = format_times(times_less(total(rows, "fp32-bytes"), up))
    seconds = float(rows[-1].get("seconds", 0.0)) if rows else 0.0
    refused = f"rejected {count}  " if (count := total(rows, "rejected")) else ""
    return (
        f"accuracy {format_accuracy(final_accuracy(rows))} (mean of last {FINAL_ROUNDS})  "
        f"uplink {format_bytes(up)}, {saving} less than fp32  "
        f"downlink {format_bytes(down)}  skips {total(rows, 'skips')}  missing {total(rows, 'missing')}  "
        f"{refused}{seconds:.1f} s"
    )


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
    strategies: dict[str, Any] = {}
    for name, seeds in runs.items():
        accuracies = [value for rows in seeds if (value := final_accuracy(rows)) is not None]
        uplink, downlink, fp32 = (
            statistics.fmean(total(rows, key) for rows in seeds)
            for key in ("uplink-bytes", "downlink-bytes", "fp32-bytes")
        )
        strategies[name] = {
            "seeds": len(seeds),
            "accuracy-mean": statistics.fmean(accuracies) if accuracies else None,
            "accuracy-std": statistics.stdev(accuracies) if len(accuracies) > 1 else None,
            "uplink-bytes": uplink,
            "downlink-bytes": downlink,
            "times-less-uplink-than-fp32": times_less(fp32, uplink),
        }
    if compare is not None:
        reference = strategies[compare]["uplink-bytes"]
        for row in strategies.values():
            row[f"times-less-uplink-than-{compare}"] = times_less(reference, row["uplink-bytes"])
    return {"compare": compare, "strategies": strategies}


def summary_table(summary: Mapping[str, Any]) -> Table:
    """Return `summarise`'s result side by side, one row per strategy."""
    compare = summary["compare"]
    table = Table(title="Summary, mean over seeds", title_justify="left", caption_justify="left")
    table.caption = "vs: how many times less uplink"
    table.add_column("strategy", no_wrap=True)
    others = ["fp32", *([compare] if compare else [])]
    for name in ("seeds", "accuracy", "uplink", "downlink", *(f"vs {name}" for name in others)):
        table.add_column(name, justify="right", no_wrap=True)
    for name, row in summary["strategies"].items():
        table.add_row(
            name,
            str(row["seeds"]),
            format_accuracy(row["accuracy-mean"], row["accuracy-std"]),
            format_bytes(row["uplink-bytes"]),
            format_bytes(row["downlink-bytes"]),
            *(format_times(row[f"times-less-uplink-than-{other}"]) for other in others),
        )
    return table
