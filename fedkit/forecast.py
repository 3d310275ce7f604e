"""Forecasts of what a plan will cost: bytes per round and run, and what a client needs, before training.

The first rounds are rehearsed (`fedkit.rehearsal`). The later rounds are taken to be like the rehearsed ones after
the first, since the first also sends the initial arrays. Uploads are counted as if no client skipped, unless the
clients train in the rehearsal: a lazy scheme sends less, and how much less depends on the training. The fault
schedule says which replies will be missing: those that it loses, and those of clients that it lets crash.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from rich.table import Table

from fedkit.errors import LaunchError
from fedkit.faults import Faults
from fedkit.files import write_json
from fedkit.follow import log_tail
from fedkit.outcome import other_strategy
from fedkit.plan import Arm, Plan, common
from fedkit.report import Row
from fedkit.report.figures import format_bytes, format_times, times_less, total
from fedkit.report.reading import FORECAST

COUNTS: Final = (
    "uplink-bytes",
    "uplink-frame-bytes",
    "downlink-bytes",
    "downlink-frame-bytes",
    "asked",
    "skips",
)
SOME: Final = 200  # clients whose fault schedule is evaluated; if there are more, these represent all


@dataclass(frozen=True)
class Forecast:
    """What one arm will cost; all sizes are bytes."""

    strategy: str
    rounds: Sequence[Row]  # all rounds of the run, as its rounds.jsonl will have them
    rehearsed: int  # how many of them were rehearsed; the others are like them
    values: int  # number of entries that a client is sent
    state: float  # what a client keeps from round to round
    peak: float  # what a client needs besides model and training: received, sent, coding
    trained: bool = False  # whether clients trained in the rehearsal, so that skips are counted
    warning: str = ""  # if the app's server started another strategy

    def save(self, folder: Path) -> None:
        """Write it into an arm's folder, where `fedkit report` finds it; raises StateError."""
        about = {"fedkit": version("fedkit"), "rehearsed": self.rehearsed, "values": self.values}
        about |= {"trained": self.trained}
        needs = {"state-bytes": self.state, "peak-bytes": self.peak}
        write_json(folder / FORECAST, {**about, **needs, "rounds": self.rounds})


def forecast(plan: Plan, rounds: int, *, train: bool = False) -> dict[str, Forecast]:
    """Return what each strategy of a plan will cost, by a rehearsal of `rounds` rounds with its first seed.

    With `train`, the clients train in the rehearsal.

    Raises
    ------
    LaunchError
        If the app's server does not run here, or its clients do not answer it.
    """
    first: dict[str, Arm] = {}
    for arm in plan.arms:
        first.setdefault(arm.strategy, arm)
    return {name: _of(arm, plan.app_dir, rounds, train) for name, arm in first.items()}


def _of(arm: Arm, app_dir: Path, rounds: int, train: bool) -> Forecast:
    wanted, clients = int(arm.config["num-rounds"]), int(arm.config["num-clients"])
    found, log = _rehearse(app_dir, arm.config, min(rounds, wanted), train)
    scale, lost = clients / found["clients"], partial(share_lost, common(arm.config).schedule(), clients)
    rows = [{**row, **{key: round(scale * row[key]) for key in COUNTS}} for row in found["rounds"]]
    return Forecast(
        strategy=arm.strategy,
        rounds=prolonged(rows, wanted, lost),
        rehearsed=len(rows),
        values=found["values"],
        state=found["state-bytes"],
        peak=found["peak-bytes"],
        trained=train,
        warning=other_strategy(arm, log),
    )


def share_lost(faults: Faults, clients: int, server_round: int) -> float:
    """Return the share of the clients whose reply in a round will be missing; clients are named by number."""
    names = [str(i) for i in range(min(clients, SOME))]
    gone = [faults.loses(server_round, n) or faults.client_crashes(server_round, n) for n in names]
    return sum(gone) / len(gone)


def prolonged(rows: Sequence[Row], num_rounds: int, lost: Callable[[int], float]) -> list[Row]:
    """Return rows for all rounds; missing ones are the mean of those after the first, or like the only one.

    `lost` returns the share of a round's replies that will be missing.
    """
    typical = rows[1:] or rows
    mean = {key: round(statistics.fmean(row[key] for row in typical)) for key in COUNTS}
    whole = [*rows, *({"round": k, **mean} for k in range(len(rows) + 1, num_rounds + 1))]
    return [{**row, "missing": round(lost(row["round"]) * row["asked"])} for row in whole]


def _rehearse(app_dir: Path, config: Mapping[str, Any], rounds: int, train: bool) -> tuple[dict[str, Any], str]:
    """Return what `fedkit.rehearsal` finds, and its log; in its own process, since apps may import anything."""
    with tempfile.TemporaryDirectory(prefix="fedkit-plan-") as folder:
        task, out, log = (Path(folder, name) for name in ("task.json", "found.json", "log"))
        write_json(task, {"app-dir": str(app_dir), "config": dict(config), "rounds": rounds, "train": train})
        with log.open("wb") as file:
            command = [sys.executable, "-m", "fedkit.rehearsal", str(task), str(out)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False)
        if done.returncode:
            raise LaunchError(
                f"{config['strategy']}: the app's server cannot be rehearsed here:\n{log_tail(log)}\n"
                "`fedkit plan` needs what the server needs: plan a deployment where its server runs. If it cannot "
                "do with clients that do not train, give --train."
            )
        return json.loads(out.read_text("utf-8")), log.read_text("utf-8", "replace")


def forecast_table(forecasts: Mapping[str, Forecast]) -> Table:
    """Return the forecasts side by side."""
    num_rounds = len(next(iter(forecasts.values())).rounds)
    table = Table(title=f"Expected in {num_rounds} rounds", title_justify="left", caption_justify="left")
    for name in ("strategy", ""):
        table.add_column(name, no_wrap=True)
    table.caption = "bytes of the first round, of each later one, of all; frames: without Flower's envelopes"
    for name in ("first", "later", "all", "frames", "vs fp32"):  # short, for a terminal of 80 columns
        table.add_column(name, justify="right", no_wrap=True)
    for name, each in forecasts.items():
        fp32 = 4 * each.values * total(each.rounds, "asked")
        for direction in ("uplink", "downlink"):
            sizes = [row[f"{direction}-bytes"] for row in each.rounds]
            cells = [sizes[0], sizes[-1], sum(sizes), total(each.rounds, f"{direction}-frame-bytes")]
            saved = format_times(times_less(fp32, sum(sizes)))
            table.add_row(name, direction.removesuffix("link"), *map(format_bytes, cells), saved)
    return table


def remarks(forecasts: Mapping[str, Forecast]) -> list[str]:
    """Return what the forecasts say besides bytes, as lines of text."""
    lines = []
    for name, each in forecasts.items():
        missing, skips, asked = (total(each.rounds, key) for key in ("missing", "skips", "asked"))
        keeps, needs = format_bytes(each.state), format_bytes(each.peak)
        skipped = f", {skips} turns skipped" if each.trained else ""
        lines.append(
            f"{name}: {missing} of {asked} replies missing{skipped}; a client keeps {keeps} between rounds,"
        )
        lines.append(f"  and needs {needs} at once, besides its model and training.")
    rehearsed = max(each.rehearsed for each in forecasts.values())
    untrained = [name for name, each in forecasts.items() if not each.trained]
    less = " Clients that skip send less: see --train." if untrained else ""
    if "tac" in untrained:
        less += " Of tac's clients each was taken to have one task; with more they send more."
    warnings = [f"warning: {each.warning}" for each in forecasts.values() if each.warning]
    return [*lines, f"{rehearsed} rounds were rehearsed.{less}", *warnings]
