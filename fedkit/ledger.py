"""Bytes per client, round and direction: sizes of what was really sent, never of what should have been."""

from __future__ import annotations

import json
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from flwr.app import ArrayRecord, MetricRecord

from fedkit.errors import ConfigError

Direction: TypeAlias = Literal["uplink", "downlink"]
EvaluateFn: TypeAlias = Callable[[int, ArrayRecord], MetricRecord | None]


@dataclass(frozen=True, slots=True)
class Entry:
    """One message that was sent."""

    server_round: int
    node_id: int
    direction: Direction
    object_bytes: int  # all of Flower's objects of the message


class Ledger:
    """Every message of a run, and what became of it.

    The `RoundGrid` enters messages; a strategy notes what only it knows (a reply it had to refuse).
    """

    def __init__(self) -> None:
        self.entries: dict[int, list[Entry]] = {}  # by round
        self._counts: dict[int, Counter[str]] = {}
        self._start = time.monotonic()

    def enter(self, entry: Entry) -> None:
        """Enter one message."""
        self.entries.setdefault(entry.server_round, []).append(entry)

    def note(self, server_round: int, **counts: int) -> None:
        """Add to the counts of a round: asked, replies, skips, missing, rejected."""
        self._counts.setdefault(server_round, Counter()).update(counts)

    def round_totals(self, server_round: int) -> dict[str, int]:
        """Return bytes by direction, and the counts, of one round."""
        counts = self._counts.get(server_round, Counter())
        totals = {key: counts[key] for key in ("asked", "replies", "skips", "missing", "rejected")}
        for direction in ("uplink", "downlink"):
            entries = self.entries.get(server_round, [])
            totals[f"{direction}-bytes"] = sum(e.object_bytes for e in entries if e.direction == direction)
        return totals

    def recording(self, evaluate_fn: EvaluateFn, *, to: str | Path) -> EvaluateFn:
        """Return an `evaluate_fn` that also appends a line per round to ``rounds.jsonl`` in the folder `to`.

        A line holds the metrics, `round_totals`, ``fp32-bytes`` (the arrays in float32, once for every client
        asked) and ``seconds`` since the ledger was made. With an empty `to`, nothing is written.

        Raises
        ------
        ConfigError
            If the folder cannot be written.
        """
        if not str(to):
            return evaluate_fn
        path = Path(to) / "rounds.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise ConfigError(f"run-dir: cannot write {path} ({error}).") from None

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            metrics = evaluate_fn(server_round, arrays)
            totals = self.round_totals(server_round)
            line = {
                "round": server_round,
                **(metrics or {}),
                **totals,
                "fp32-bytes": totals["asked"] * 4 * sum(math.prod(a.shape) for a in arrays.values()),
                "seconds": round(time.monotonic() - self._start, 3),
            }
            with path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            return metrics

        return evaluate
