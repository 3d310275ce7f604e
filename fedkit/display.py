"""Terminal output: an arm during and after its run, and the findings of `fedkit doctor`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from fedkit.doctor import Finding
from fedkit.ledger import ROUNDS
from fedkit.plan import Arm
from fedkit.report import Row, read_rounds
from fedkit.report.tables import missing_table, news, refused_lines, round_table, totals_line

WIDTH: Final = 120  # columns
SIGNS: Final = {"ok": "[green]✓[/]", "warning": "[yellow]![/]", "problem": "[red]✗[/]"}


def make_console() -> Console:
    """Return where to print; what is not a terminal is wide enough for all tables."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=WIDTH)


def finding_line(finding: Finding) -> str:
    """Return a finding and, on a separate line, what to do, in Rich's markup."""
    line = f"{SIGNS[finding.level]} [bold]{escape(finding.what)}[/]: {escape(finding.found)}"
    return f"{line}\n    {escape(finding.advice)}" if finding.advice else line


def show(console: Console, arm: Arm, warnings: Sequence[str] = ()) -> None:
    """Print what happened in an arm, and the warnings about it."""
    rows = read_rounds(arm.run_dir / ROUNDS)
    console.print(round_table(rows, arm.title))
    if (missing := missing_table(rows)) is not None:
        console.print(missing)
    for line in refused_lines(rows):
        console.print(escape(line), soft_wrap=True)
    console.print(totals_line(rows), soft_wrap=True)
    for warning in warnings:
        console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)


@contextmanager
def live_display(console: Console, arm: Arm) -> Iterator[Callable[[Row], None]]:
    """Yield an `on_round` that shows an arm's progress: a bar on a terminal, elsewhere a line per round."""
    num_rounds = int(arm.config["num-rounds"])
    rows = read_rounds(arm.run_dir / ROUNDS)  # of a resumed run; its last round may be run again
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[news]}")
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        done = rows[-1]["round"] if rows else 0
        task = progress.add_task(arm.title, total=num_rounds, completed=done, news="starting")

        def on_round(row: Row) -> None:
            rows[:] = [*(old for old in rows if old["round"] < row["round"]), row]
            progress.update(task, completed=row["round"], news=news(rows))
            if not console.is_terminal:
                line = f"{arm.title}  round {row['round']}/{num_rounds}  {news(rows)}"
                console.print(line, soft_wrap=True)

        yield on_round
