"""Folders as runs leave them, written without running anything."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VERSIONS = {"python": "3.11.2", "fedkit": "0.1.0", "flwr": "1.39.0"}


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Write lines of JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_json(path: Path, value: object) -> None:
    """Write JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_run(
    folder: Path,
    strategies: Sequence[str] = ("aquila", "fedavg"),
    *,
    rounds: int = 4,
    seeds: int = 2,
    clients: Sequence[str] = ("0", "1", "10", "2"),
    status: str = "completed",
    superlink: str | None = None,
) -> list[Path]:
    """Write a run: client `k` skips in round k, the last one is missing in round 2; return the arms' folders."""
    config = {"num-rounds": rounds, "num-clients": len(clients), "learning-rate": 0.01}
    names = [(s, seed, folder / f"{s}-seed{seed}") for s in strategies for seed in range(seeds)]
    arms = [{"name": at.name, "run-config": {**config, "strategy": s, "seed": seed}} for s, seed, at in names]
    if superlink:
        for arm in arms:
            arm["run-config"]["run-dir"] = f"{folder.name}-77/{arm['name']}"
    about = {"fedkit": "0.1.0", "app": "digits", "app-dir": "/app", "compare": strategies[-1]}
    write_json(folder / "plan.json", about | {"superlink": superlink, "arms": arms})
    for number, (strategy, seed, at) in enumerate(names):
        size = 900 if strategy == "fedavg" else 100
        head = {"app": "digits", "strategy": strategy, "seed": seed, "run-config": arms[number]["run-config"]}
        times = {"versions": VERSIONS, "started": "2026-11-26T10:00:00+00:00", "finished": None}
        write_json(at / "run.json", head | times | {"git-commit": "c" * 40, "status": status})
        write_lines(at / "rounds.jsonl", [_row(k, size, seed, clients) for k in range(rounds + 1)])
        write_lines(at / "ledger.jsonl", [e for k in range(1, rounds + 1) for e in _entries(k, size, clients)])
    return [at for _, _, at in names]


def cluster_lines(rounds: int, clients: Sequence[str]) -> list[dict[str, Any]]:
    """Return what TAC's server says of its clusters: two slots for each client."""
    return [
        {
            "round": k,
            "adapters": [
                {"client": c, "slot": slot, "cluster": (number + slot) % 2, "x": number - 0.1 * k, "y": 2.0 * slot}
                for number, c in enumerate(clients)
                for slot in range(2)
            ],
            "ari": 1 - 0.5**k,
            "purity": 1 - 0.5 ** (k + 1),
        }
        for k in range(1, rounds + 1)
    ]


def _row(k: int, size: int, seed: int, clients: Sequence[str]) -> dict[str, Any]:
    row: dict[str, Any] = {"round": k, "accuracy": 0.95 - 0.75 * 0.8**k + 0.02 * seed, "loss": 2.0 / (k + 1)}
    if k == 0:
        return row
    asked = len(clients)
    row |= {"asked": asked, "skips": 1, "missing": int(k == 2), "seconds": float(k), "fp32-bytes": asked * 1000}
    row |= {"uplink-bytes": asked * size, "uplink-frame-bytes": asked * (size - 20), "uplink-ideal-bytes": 50}
    row |= {"downlink-bytes": asked * 300, "downlink-frame-bytes": asked * 280, "downlink-ideal-bytes": 70}
    row["train"] = {"train-loss": 1.0 / k, "effective-rank": 3.0 + 0.1 * k}
    if k == 2:
        row |= {"missing-clients": [clients[-1]], "stand-ins": {clients[-1]: clients[0]}}
    return row


def _entries(k: int, size: int, clients: Sequence[str]) -> list[dict[str, Any]]:
    entries = []
    for number, client in enumerate(clients):
        entry = {"server-round": k, "client": client, "node-id": 1000 + number, "kind": "train", "ideal-bits": 9.0}
        down = {"direction": "downlink", "object-bytes": 300, "frame-bytes": 280, "objects": 6, "fate": ""}
        entries.append({**entry, **down, "client": client if k > 1 else str(1000 + number)})
        if k == 2 and number == len(clients) - 1:
            continue
        fate = "skip" if number == k else "rejected" if (number, k) == (0, 3) else ""
        sizes = {"object-bytes": size + number, "frame-bytes": 0 if fate == "skip" else size - 20}
        entries.append({**entry, **sizes, "direction": "uplink", "objects": 6, "fate": fate})
    return entries
