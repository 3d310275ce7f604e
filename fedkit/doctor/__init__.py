"""Checks whether this machine, and an app, are ready for fedkit: findings, and what to do about each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from .app import app_findings
from .finding import Finding, Level
from .machine import machine_findings
from .packages import package_findings
from .services import service_findings

__all__ = ["Finding", "Level", "examine"]


def examine(app_dir: Path | None = None) -> Iterator[Finding]:
    """Yield what is found here, and in an app's directory if one is given."""
    yield from package_findings()
    yield from machine_findings()
    yield from service_findings()
    if app_dir is not None:
        yield from app_findings(app_dir)
