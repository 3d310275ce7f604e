"""Arms, rows and tables, which all benchmarks share.

An *arm* is one thing measured; its result is a *row*, a flat dict. Rows are appended to a JSON Lines file as they
finish. An arm is identified by its name and a digest of its parameters. An arm that is already in the file is not
measured again, unless something was not installed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import commit, machine

Row = dict[str, Any]
MISSING = "missing"  # the key of a row that says what to install


class NotInstalledError(Exception):
    """A peer cannot be imported. The message says how to install it."""


@dataclass
class Bench:
    """One benchmark's run: what was asked for, and the rows so far."""

    name: str
    options: argparse.Namespace
    rows: list[Row] = field(default_factory=list)
    console: Console = field(default_factory=lambda: Console(width=max(Console().width, 132)))
    _known: dict[str, Row] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.options.fresh:
            self.path.unlink(missing_ok=True)
        if self.path.exists():
            self._known = {row["key"]: row for row in map(json.loads, self.path.read_text().splitlines())}

    @property
    def full(self) -> bool:
        """Whether the README's figures are asked for."""
        return bool(self.options.full)

    @property
    def path(self) -> Path:
        """The file of this run's rows."""
        return Path(self.options.out, f"{self.name}-{'full' if self.options.full else 'small'}.jsonl")

    def arm(self, name: str, measure: Callable[[], Row], **params: Any) -> Row:
        """Return the row of an arm: from the file, or measured now and written there."""
        key = f"{name}/{digest(params)}"
        row = self._known.get(key, {})
        if not row or MISSING in row:
            try:
                found = measure()
            except NotInstalledError as error:
                found = {MISSING: str(error)}
            row = {"key": key, "arm": name, **params, **found, "commit": commit(), "machine": machine()}
            with self.path.open("a") as file:
                file.write(json.dumps(row) + "\n")
            self._known[key] = row
            self.console.print(f"[dim]{name}: {_brief(found)}[/dim]", highlight=False)
        self.rows.append(row)
        return row

    def table(self, title: str, columns: Mapping[str, str], rows: Sequence[Row]) -> None:
        """Print rows as a table; `columns` are titles by key. What is not installed is a row, too."""
        table = Table(title=title, title_justify="left")
        for number, heading in enumerate(columns.values()):
            table.add_column(heading, justify="right" if number else "left", no_wrap=not number)
        for row in rows:
            if MISSING in row:
                table.add_row(str(row["arm"]), f"not installed: {row[MISSING]}")
            else:
                table.add_row(*[_cell(row.get(key)) for key in columns])
        self.console.print(table)

    def finish(self) -> None:
        """Write the rows of this run, all of them, where ``--json`` says."""
        if self.options.json:
            Path(self.options.json).write_text(json.dumps(self.rows, indent=1) + "\n")
        self.console.print(f"{len(self.rows)} rows in {self.path}", highlight=False)


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return the options that every benchmark has; `doc` is its module's docstring."""
    options = argparse.ArgumentParser(description=(doc or "").split("\n")[0])
    options.add_argument("--full", action="store_true", help="the README's figures instead of a quick look")
    options.add_argument("--fresh", action="store_true", help="measure again what was measured already")
    options.add_argument("--json", metavar="FILE", help="write the table as data")
    options.add_argument(
        "--out", metavar="DIR", default="benchmark-runs", help="where rows are kept (%(default)s)"
    )
    return options


def digest(params: Mapping[str, Any]) -> str:
    """Return 8 hexadecimal digits that depend on the parameters of an arm."""
    text = json.dumps(params, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def sources_digest(*folders: str) -> str:
    """Return 8 hexadecimal digits of the Python sources in folders of this repository.

    A parameter of the arms that measure fedkit: what was measured with other sources is measured again.
    """
    root = Path(__file__).parents[1]
    paths = sorted(path for folder in folders for path in (root / folder).rglob("*.py"))
    return hashlib.blake2b(b"".join(path.read_bytes() for path in paths), digest_size=4).hexdigest()


def _brief(found: Row) -> str:
    return ", ".join(f"{key} {_cell(value)}" for key, value in found.items() if not isinstance(value, list | dict))


def _cell(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
