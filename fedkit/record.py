"""The record of an arm in `run.json`, kept up to date while it runs and however it ends."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from fedkit import checkpoint
from fedkit.errors import ConfigError
from fedkit.files import write_json
from fedkit.ledger import JOURNAL, ROUNDS
from fedkit.plan import Arm

NAME: Final = "run.json"
LOG: Final = "flower.log"


def completed(arm: Arm) -> bool:
    """Return whether an arm is completed."""
    return read(arm).get("status") == "completed"


def read(arm: Arm) -> dict[str, Any]:
    """Return what is recorded of an arm; empty if it was not begun.

    Raises
    ------
    ConfigError
        If it cannot be read.
    """
    path = arm.run_dir / NAME
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: expected what `fedkit run` wrote ({error}). Delete it to run it again."
        ) from None
    return dict(record)


@contextmanager
def recorded(arm: Arm, app: str, app_dir: Path) -> Iterator[None]:
    """Keep `run.json` up to date: what runs, with which versions, and how it ended.

    Resumptions of an arm are recorded; an arm without a checkpoint starts again, without its old rounds.
    """
    now = {
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("fedkit", "flwr")},
        "git-commit": git_commit(app_dir),
        "started": _time(),
    }
    about = {
        "app": app,
        "strategy": arm.strategy,
        "seed": arm.config["seed"],
        "run-config": dict(arm.config),
    }
    record = read(arm)
    if record:
        former = record.pop("resumptions", [])
        record |= about | {"resumptions": [*former, now | {"after-status": record["status"]}]}
        _make_way(arm, len(former) + 1)
    else:
        record = about | now
    arm.run_dir.mkdir(parents=True, exist_ok=True)

    def write(status: str) -> None:
        finished = None if status == "running" else _time()
        write_json(arm.run_dir / NAME, {**record, "finished": finished, "status": status})

    write("running")
    try:
        yield
    except BaseException as error:
        write("failed" if isinstance(error, Exception) else "interrupted")
        raise
    write("completed")


def git_commit(directory: Path) -> str | None:
    """Return the commit checked out in a directory, with `-dirty` if there are changes; None without git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _make_way(arm: Arm, attempt: int) -> None:
    """Keep the log of an arm's previous attempt; drop its rounds unless the next attempt continues from them."""
    log = arm.run_dir / LOG
    if log.exists():
        log.replace(log.with_suffix(f".{attempt}.log"))
    if not arm.elsewhere and not (arm.run_dir / checkpoint.NAME).exists():
        for name in (ROUNDS, JOURNAL):
            (arm.run_dir / name).unlink(missing_ok=True)


def _time() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
