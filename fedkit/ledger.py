"""Bytes per client, round and direction: measured sizes of what was sent, never what should have been sent."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, TypeAlias

from flwr.app import ArrayRecord, MetricRecord

from fedkit.entry import Direction, Entry, Fate
from fedkit.errors import ConfigError, StateError
from fedkit.files import append_lines, put_line, take_up
from fedkit.sockets import Traffic

logger = logging.getLogger(__name__)

EvaluateFn: TypeAlias = Callable[[int, ArrayRecord], MetricRecord | None]
ROUNDS: Final = "rounds.jsonl"  # a line of JSON per round
JOURNAL: Final = "ledger.jsonl"  # and per message
CLUSTERS: Final = "clusters.jsonl"  # and per round of TAC: which adapter is in which cluster
ANNOUNCED: Final = "fedkit round: "  # before a line of `ROUNDS`, in the log
TRAIN: Final = "train"  # a key of a round: what its clients measured when they trained
REFUSED: Final = "refused"  # a key of a round: why a reply could not be used, by client
MOST_WORDS: Final = 300  # longest such reason, in characters
MISSING_CLIENTS, STAND_INS = "missing-clients", "stand-ins"  # keys of a round: a list, and names by name
RESERVED: Final = {"round", TRAIN, REFUSED, MISSING_CLIENTS, STAND_INS}  # no metric may have these names


class Ledger:
    """Every message of a run, and what became of it, as told by the `RoundGrid` and strategies."""

    def __init__(self) -> None:
        self.entries: dict[int, list[Entry]] = {}  # by round
        self._spent: Counter[int] = Counter()  # by node
        self._spent_before: Counter[str] = Counter()  # by client, before the run was resumed
        self._envelope = 0
        self._all: list[Entry] = []  # in the order in which they were entered
        self._journals: dict[Path, int] = {}  # how many entries each file has
        self._uplink: dict[int, Entry] = {}  # the last upload of each node
        self._ideal: dict[int, float] = {}  # bits of each node's next message down
        self._counts: dict[int, Counter[str]] = {}
        self._values: dict[int, int] = {}  # that all clients together were asked to train, by round
        self._sockets: dict[int, Counter[str]] = {}
        self._measured: dict[int, dict[str, Any]] = {}  # by round
        self._start = time.monotonic()

    def enter(self, entry: Entry) -> None:
        """Enter one message."""
        self._spent[entry.node_id] += entry.object_bytes
        self._envelope = max(self._envelope, entry.object_bytes - entry.frame_bytes)
        if entry.direction == "uplink":
            self._uplink[entry.node_id] = entry
        else:
            entry.ideal_bits = self._ideal.pop(entry.node_id, 0.0)
        self.entries.setdefault(entry.server_round, []).append(entry)
        self._all.append(entry)

    def ideal(self, node_id: int, direction: Direction, bits: float) -> None:
        """Record the bits that an ideal coder needs for the node's next message down, or its last one up."""
        if direction == "downlink":
            self._ideal[node_id] = bits
        elif node_id in self._uplink:
            self._uplink[node_id].ideal_bits = bits

    def refuse(self, server_round: int, node_id: int, reason: str) -> None:
        """Record why a reply cannot be used: the last line of the reason, which has the cause."""
        last = (reason.strip().splitlines() or [""])[-1].strip()
        why = self._measured.setdefault(server_round, {}).setdefault(REFUSED, {})
        why[self.client_of(node_id)] = last if len(last) <= MOST_WORDS else f"{last[:MOST_WORDS]} …"

    def judge(self, server_round: int, node_id: int, fate: Fate) -> None:
        """Record what became of a node's last message up; count it in the round if it is skipped or rejected."""
        if node_id in self._uplink:
            self._uplink[node_id].fate = fate
        if fate == "skip":
            self.note(server_round, skips=1)
        elif fate == "rejected":
            self.note(server_round, rejected=1, replies=-1)

    def note(self, server_round: int, **counts: int) -> None:
        """Add to the counts of a round: asked, replies, skips, missing, rejected, late."""
        self._counts.setdefault(server_round, Counter()).update(counts)

    def miss(self, server_round: int, clients: Sequence[str], stand_ins: Mapping[str, str]) -> None:
        """Record the clients missing in a round, and each one's stand-in; itself: by its last update."""
        if clients:
            known = self._measured.setdefault(server_round, {})
            known |= {MISSING_CLIENTS: list(clients), STAND_INS: dict(stand_ins)}
            told = (f"{name} ({stand_ins[name]} stands in)" if name in stand_ins else name for name in clients)
            logger.info("round %d is without client %s.", server_round, ", ".join(told))

    def whole(self, server_round: int, num_values: int) -> None:
        """Record how many values all clients together were asked to train in a round."""
        self._values[server_round] = num_values

    def carry(self, server_round: int, traffic: Traffic) -> None:
        """Add the traffic on the server's socket during a round."""
        bytes_of = {"socket-uplink-bytes": traffic.received, "socket-downlink-bytes": traffic.sent}
        self._sockets.setdefault(server_round, Counter()).update(bytes_of)

    def round_totals(self, server_round: int) -> dict[str, int]:
        """Return bytes by direction, and the counts, of one round; also bytes on the socket, if measured."""
        counts = self._counts.get(server_round, Counter())
        totals = {key: counts[key] for key in ("asked", "replies", "skips", "missing", "rejected", "late")}
        totals |= self._sockets.get(server_round, {})
        for direction in ("uplink", "downlink"):
            entries = [e for e in self.entries.get(server_round, []) if e.direction == direction]
            totals[f"{direction}-bytes"] = sum(e.object_bytes for e in entries)
            totals[f"{direction}-frame-bytes"] = sum(e.frame_bytes for e in entries)
            totals[f"{direction}-ideal-bytes"] = round(sum(e.ideal_bits for e in entries) / 8)
        return totals

    def spent(self, node_id: int | None = None) -> int:
        """Return the bytes of all messages, or of those to and from one node's client."""
        if node_id is None:
            return sum(self._spent.values()) + sum(self._spent_before.values())
        return self._spent[node_id] + self._spent_before[self.client_of(node_id)]

    def envelope(self, default: int) -> int:
        """Return the most bytes of any message besides its frames; `default` before the first message."""
        return self._envelope or default

    def last_upload(self, node_id: int) -> int:
        """Return the bytes of a node's last frames; 0 before there are any."""
        return self._uplink[node_id].frame_bytes if node_id in self._uplink else 0

    def client_of(self, node_id: int) -> str:
        """Return which client a node is, once it has answered; the node's id until then."""
        return self._uplink[node_id].client if node_id in self._uplink else str(node_id)

    @property
    def seconds(self) -> float:
        """Seconds since the ledger was created; for a resumed run, only those during which it ran."""
        return time.monotonic() - self._start

    def journal(self, path: Path) -> int:
        """Append the entries that the file lacks, one line of JSON each; return the file's size in bytes."""
        path = path.resolve()
        known = self._journals.get(path)
        size = append_lines(path, [_line(entry) for entry in self._all[known or 0 :]], anew=known is None)
        self._journals[path] = len(self._all)
        return size

    def restore(self, path: Path, size: int, seconds: float) -> None:
        """Resume the run whose journal had `size` bytes after `seconds`; whatever was appended later is cut off.

        Raises
        ------
        StateError
            If the journal is shorter, or damaged.
        """
        try:
            lines = [{key.replace("-", "_"): v for key, v in line.items()} for line in take_up(path, size)]
            entries = [Entry(**line) for line in lines]
        except TypeError as error:
            raise StateError(f"cannot take up {path} ({error}). Was it damaged?") from None
        clients = {entry.node_id: entry.client for entry in entries}  # as known at the end
        for entry in entries:
            self.entries.setdefault(entry.server_round, []).append(entry)
            self._spent_before[clients[entry.node_id]] += entry.object_bytes
            self._envelope = max(self._envelope, entry.object_bytes - entry.frame_bytes)
        self._all = entries
        self._journals[path.resolve()], self._start = len(entries), time.monotonic() - seconds

    def measure(self, server_round: int, metrics: MetricRecord) -> None:
        """Record what the clients measured when they evaluated a round."""
        own = self._measured.setdefault(server_round, {})
        own.update({key: value for key, value in metrics.items() if key not in RESERVED})

    def trained(self, server_round: int, metrics: MetricRecord) -> None:
        """Record what the clients measured in training, and the metrics of the aggregation."""
        self._measured.setdefault(server_round, {})[TRAIN] = dict(metrics)

    def recording(self, evaluate_fn: EvaluateFn | None, *, to: str | Path | None) -> EvaluateFn:
        """Return an `evaluate_fn` that also logs each round, and records it in the folder `to`, if given.

        Each line of ``rounds.jsonl`` is a round: the metrics of `evaluate_fn` or of the clients, those of
        training under `TRAIN`, `round_totals`, `miss`, `refuse`, ``fp32-bytes`` (in float32, what each client was
        asked to train, or else all the arrays) and ``seconds`` since the ledger was created. A round that is run
        again after a resumption replaces its line and all later ones. Each line of ``ledger.jsonl`` is a message.
        The log has the lines of ``rounds.jsonl``, each after the word `ANNOUNCED`.

        Raises
        ------
        ConfigError
            If the folder cannot be written.
        """
        folder = Path(to) if to else None
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
                for name in (ROUNDS, JOURNAL):
                    (folder / name).touch()
        except OSError as error:
            raise ConfigError(f"run-dir: cannot write {folder} ({error}).") from None

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            metrics = evaluate_fn(server_round, arrays) if evaluate_fn else None
            totals = self.round_totals(server_round)
            everything = totals["asked"] * sum(math.prod(a.shape) for a in arrays.values())
            line = {
                "round": server_round,
                **self._measured.get(server_round, {}),
                **{key: value for key, value in (metrics or {}).items() if key not in RESERVED},
                **totals,
                "fp32-bytes": 4 * self._values.get(server_round, everything),
                "seconds": round(self.seconds, 3),
            }
            line = _strict(line)
            logger.info("%s%s", ANNOUNCED, json.dumps(line))
            if folder:
                self.journal(folder / JOURNAL)
                put_line(folder / ROUNDS, line, key="round")
            return metrics

        return evaluate


def _strict(value: Any) -> Any:
    """Return a value with NaN and infinity, which JSON does not have, replaced by null."""
    if isinstance(value, Mapping):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_strict(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(entry: Entry) -> dict[str, object]:
    return {field.replace("_", "-"): value for field, value in asdict(entry).items()}
