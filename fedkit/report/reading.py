"""Reads the folders of runs as they are: complete or not, from a simulation or a deployment."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from fedkit import plan, record
from fedkit.errors import ConfigError
from fedkit.ledger import CLUSTERS, JOURNAL, MISSING_CLIENTS, ROUNDS, STAND_INS
from fedkit.plan import Arm, Plan

from .figures import Row, read_rounds

ENTRY: Final = ("server-round", "client", "node-id", "direction", "kind", "object-bytes", "objects")  # of a ledger
FORECAST: Final = "forecast.json"  # in an arm's folder: its predicted rounds
UNFINISHED: Final = {
    "running": "is running",
    "stopped": "was stopped",
    "failed": "failed",
    "interrupted": "was interrupted",
    "not begun": "was not begun",
}


@dataclass(frozen=True)
class ArmRecord:
    """The records of one arm."""

    folder: Path
    run: str  # the name of its run's folder
    strategy: str
    seed: str
    status: str  # "completed", a key of `UNFINISHED`, or "" if unknown
    rows: Sequence[Row]
    entries: Sequence[Mapping[str, Any]]  # of the ledger; empty if it is on another machine
    clusters: Sequence[Mapping[str, Any]] = ()
    forecast: Mapping[str, Any] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)  # its run.json
    reference: bool = False  # whether the other arms of its run are compared with it

    @property
    def config(self) -> Mapping[str, Any]:
        """The run config."""
        found: Mapping[str, Any] = self.about.get("run-config", {})
        return found

    @property
    def title(self) -> str:
        """The name of this arm."""
        return f"{self.strategy}, seed {self.seed}" if self.seed else self.strategy


def read_arms(folders: Sequence[Path]) -> list[ArmRecord]:
    """Return the records of the arms in some folders: of a `fedkit run`, of one arm, or of a server.

    If both a server's folder and that of the command that submitted the run are given, the server's rounds and
    ledger become part of the latter.

    Raises
    ------
    ConfigError
        If a folder holds no arm.
    """
    arms = [arm for folder in folders for arm in _arms_in(folder.resolve())]
    servers = {f"{arm.run}/{arm.folder.name}": arm for arm in arms if not arm.about}
    merged, used = [], set()
    for arm in arms:
        there = servers.get(str(arm.config.get("run-dir"))) if not arm.entries else None
        if there is not None:
            used.add(there.folder)
            arm = replace(arm, rows=there.rows, entries=there.entries, clusters=there.clusters or arm.clusters)
        merged.append(arm)
    return [arm for arm in merged if arm.folder not in used]


def _arms_in(folder: Path) -> Iterator[ArmRecord]:
    if (folder / plan.NAME).exists():
        known = Plan.load(folder)
        busy = _is_busy(known)
        for arm in known.arms:
            found = _read(arm.run_dir, folder.name, arm, busy=busy)
            yield replace(found, reference=found.strategy == known.compare)
        return
    paths = [path for path in (folder, *sorted(folder.glob("*"))) if _is_arm(path)]
    if not paths:
        raise ConfigError(
            f"{folder}: expected the folder of a `fedkit run`, or of one arm, got no {ROUNDS} in it."
        )
    for path in paths:
        busy = (path.parent / plan.NAME).exists() and _is_busy(Plan.load(path.parent))
        yield _read(path, path.parent.name, None, busy=busy)


def _is_arm(folder: Path) -> bool:
    return (folder / ROUNDS).exists() or (folder / record.NAME).exists()


def _is_busy(known: Plan) -> bool:
    """Return whether a command is running a plan."""
    try:
        with known.locked():
            return False
    except ConfigError:
        return True


def _read(folder: Path, run: str, arm: Arm | None, *, busy: bool) -> ArmRecord:
    about = _read_json(folder / record.NAME)
    if arm is not None:
        about = {"run-config": dict(arm.config), "status": "not begun", **about}
    name = re.fullmatch(r"(.+)-seed(-?\d+)", folder.name)
    strategy, seed = name.groups() if name else (folder.name, "")
    config = about.get("run-config", {})
    status = about.get("status", "")
    clusters = _read_lines(folder / CLUSTERS, "round", "adapters")
    scores = {line["round"]: {k: line[k] for k in ("ari", "purity") if k in line} for line in clusters}
    rounds = [{**scores.get(row["round"], {}), **row} for row in read_rounds(folder / ROUNDS)]
    rows, entries = _by_client(rounds, _read_lines(folder / JOURNAL, *ENTRY))
    return ArmRecord(
        folder=folder,
        run=run,
        strategy=str(about.get("strategy", config.get("strategy", strategy))),
        seed=str(about.get("seed", config.get("seed", seed))),
        status="stopped" if status == "running" and not busy else status,
        rows=rows,
        entries=entries,
        clusters=clusters,
        forecast=_read_json(folder / FORECAST),
        about=about,
    )


def _by_client(
    rows: Sequence[Row], entries: Sequence[Mapping[str, Any]]
) -> tuple[list[Row], list[Mapping[str, Any]]]:
    """Return rounds and messages with the client names that became known once nodes had answered."""
    names = {str(entry["node-id"]): str(entry["client"]) for entry in entries}
    known: list[Row] = [
        {
            **row,
            MISSING_CLIENTS: [names.get(name, name) for name in row.get(MISSING_CLIENTS, ())],
            STAND_INS: {names.get(k, k): names.get(v, v) for k, v in row.get(STAND_INS, {}).items()},
        }
        for row in rows
    ]
    return known, [{**entry, "client": names[str(entry["node-id"])]} for entry in entries]


def _read_json(path: Path) -> dict[str, Any]:
    """Return a JSON object; empty if there is none that is complete."""
    try:
        found = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _read_lines(path: Path, *keys: str) -> list[dict[str, Any]]:
    """Return the JSON objects in a file that have all `keys`; other lines, such as torn ones, are skipped."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and value.keys() >= set(keys):
            found.append(value)
    return found
