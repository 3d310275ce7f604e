"""Follows rounds as they are recorded: in the server's file, or in its log if the file is on another machine."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from fedkit.files import put_line
from fedkit.ledger import ANNOUNCED
from fedkit.report import Row, read_rounds

_COLOURS: Final = re.compile(r"\x1b\[[0-9;]*m")


class RoundsFollower:
    """Calls `on_round` once for each round that a server records in `path` from now on, or records anew."""

    def __init__(self, path: Path, on_round: Callable[[Row], None]) -> None:
        self.path, self.on_round = path, on_round
        self._state = self._stat()
        self._seen = {row["round"]: row for row in read_rounds(path)}

    def report(self) -> None:
        """Report the rounds recorded since the last call."""
        state = self._stat()
        if state == self._state:
            return
        self._state = state
        for row in read_rounds(self.path):
            if self._seen.get(row["round"]) != row:
                self._seen[row["round"]] = row
                self.on_round(row)

    def _stat(self) -> tuple[int, ...]:
        """Return values that change when the file is written; size alone may not, if a round is run again."""
        try:
            stat = self.path.stat()
        except FileNotFoundError:
            return ()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


class LogFollower:
    """Records in `path` the rounds that a server announces in its log, and calls `on_round` once for each.

    The log may restart at any time, for instance when a stream of it breaks off and is reopened.
    """

    def __init__(self, log: Path, path: Path, on_round: Callable[[Row], None]) -> None:
        self.log, self.path, self.on_round = log, path, on_round
        self._offset = 0
        self._seen = {row["round"]: row for row in read_rounds(path)}

    def report(self) -> None:
        """Report the rounds announced since the last call."""
        for row in self._announced():
            if self._seen.get(row["round"]) != row:
                self._seen[row["round"]] = row
                self.path.touch()
                put_line(self.path, row, key="round")
                self.on_round(row)

    def _announced(self) -> Iterator[Row]:
        if not self.log.exists():
            return
        if self.log.stat().st_size < self._offset:
            self._offset = 0
        with self.log.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return  # the rest is still to come
                self._offset += len(line)
                _, found, text = plain(line.decode(errors="replace")).partition(ANNOUNCED)
                with suppress(ValueError, TypeError, LookupError):  # an app may print anything
                    if found and isinstance((row := json.loads(text))["round"], int):
                        yield row


def plain(text: str) -> str:
    """Return a text without terminal colour codes."""
    return _COLOURS.sub("", text)


def log_tail(log: Path, num_lines: int = 30) -> str:
    """Return the last traceback in a log and what follows, or the last lines if there is none."""
    lines = plain(log.read_text(errors="replace")).rstrip().splitlines()
    tracebacks = [number for number, line in enumerate(lines) if line.startswith("Traceback ")]
    return "\n".join(lines[tracebacks[-1] :] if tracebacks else lines[-num_lines:])
