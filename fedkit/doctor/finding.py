"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "problem"]
"""As it should be; worth knowing, for something will not work or not well; nothing works before it is mended."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, and what to do about it unless it is as it should be."""

    level: Level
    what: str
    found: str
    advice: str = ""


def ok(what: str, found: str) -> Finding:
    """Return that something is as it should be."""
    return Finding("ok", what, found)


def warning(what: str, found: str, advice: str) -> Finding:
    """Return what is worth knowing."""
    return Finding("warning", what, found, advice)


def problem(what: str, found: str, advice: str) -> Finding:
    """Return what must be mended."""
    return Finding("problem", what, found, advice)
