"""The finding of one check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Level: TypeAlias = Literal["ok", "warning", "problem"]
"""As it should be; something will not work, or not well; nothing works before this is fixed."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found, and, unless it is as it should be, what to do about it."""

    level: Level
    what: str
    found: str
    advice: str = ""


def ok(what: str, found: str) -> Finding:
    """Return the finding that something is as it should be."""
    return Finding("ok", what, found)


def warning(what: str, found: str, advice: str) -> Finding:
    """Return a finding that is worth knowing."""
    return Finding("warning", what, found, advice)


def problem(what: str, found: str, advice: str) -> Finding:
    """Return a finding that must be fixed."""
    return Finding("problem", what, found, advice)
