"""Checks whether a run did what was asked, by its rounds and its log: an app may ignore the run config."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from fedkit.errors import OutcomeError
from fedkit.follow import plain
from fedkit.ledger import ROUNDS
from fedkit.plan import Arm
from fedkit.record import LOG
from fedkit.report import Row, read_rounds
from fedkit.report.figures import total
from fedkit.report.tables import refusals
from fedkit.strategies.by_name import STRATEGIES, class_of

_STARTED: Final = re.compile(r"Starting (\w+) strategy")  # as Flower logs it
_HOW: Final = "See strategies/README.md: what `fedkit run` needs of an app."


def check_outcome(arm: Arm) -> list[str]:
    """Return warnings about an arm that has ended without an error.

    Raises
    ------
    OutcomeError
        If no round was recorded, no message counted, or every reply refused.
    """
    rows = [row for row in read_rounds(arm.run_dir / ROUNDS) if row["round"]]
    if not rows:
        raise OutcomeError(
            "the app ended, and recorded no round: its server has to give `start` an "
            f"evaluate_fn=grid.ledger.recording(evaluate, to=config.folder). {_HOW}"
        )
    if all(row.get("asked") == 0 for row in rows):
        raise OutcomeError(
            "no client was asked to train in any round, as far as was counted: the app's server has to give "
            f"`start` a RoundGrid(grid, faults=config.schedule(), limits=config.limits()). {_HOW}"
        )
    if total(rows, "rejected") and not total(rows, "replies"):
        raise OutcomeError(f"every reply was refused, so nothing was learnt. {_first(rows)}")
    log = arm.run_dir / LOG
    warning = other_strategy(arm, log.read_text("utf-8", "replace")) if log.exists() else ""
    return [warning] if warning else []


def _first(rows: Sequence[Row]) -> str:
    found = refusals(rows)
    return f"The reason: {found[0][1]}" if found else f"The reasons are in {LOG}."


def other_strategy(arm: Arm, log: str) -> str:
    """Return a warning if the server's log names another known strategy than the run config does."""
    wanted = STRATEGIES.get(arm.strategy)
    if wanted is None:
        return ""
    known = {class_of(each).__name__ for each in STRATEGIES.values()}
    started = set(_STARTED.findall(plain(log))) & known
    name = class_of(wanted).__name__
    if not started or name in started:
        return ""
    return (
        f"{arm.title}: the app started {', '.join(sorted(started))}, not {name}: its server does not construct "
        f"its strategy by fedkit.strategies.build(config), so `strategy` does nothing. {_HOW}"
    )
