"""Seeded fault schedules: one value for the in-process grid, simulation and deployment.

A schedule depends on its fields, the round and the client, and on nothing else: not on the order of calls, the
process or the machine. So a run can be repeated, and two runs can be compared under the same losses.

=======================  ==========================================================================================
field of `Faults`        what it does
=======================  ==========================================================================================
`drop`                   probability that a reply is lost, independently of the others
`groups`                 instead, for clients whose id matches a shell pattern (``[0-4]``); of several, the largest
`rates`                  instead of both, for single clients by id
`bursts`                 in addition, a client loses several replies in a row
`late`, `mean_delay`     probability that a reply is late; by how many seconds on average (exponential)
`duplicate`              probability that a reply arrives twice
`client_crash`           probability that a client crashes: it forgets what is in memory and does not answer
`server_crash_rounds`    the rounds in which the server crashes
`events`                 additional single events: a recorded trace
`seed`, `start_round`    the seed of all draws; the first round in which anything is drawn
=======================  ==========================================================================================

Each kind has its own random stream: switching one on leaves the others as they were. If several faults coincide,
the worst wins.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import numpy as np

from fedkit.errors import ConfigError

T = TypeVar("T", "Bursts", "Event", "Faults")
Probability: TypeAlias = float
# The end of each kind's seeds; never 0, since NumPy pads with zeros. Lost replies came first, with nothing.
_STREAMS: Final = {"lost": (), "chain": (1,), "burst": (2,), "late": (3,), "duplicate": (4,), "crash": (5,)}


@dataclass(frozen=True, slots=True)
class Bursts:
    """Losses in a row: each client is in a good or a bad state, a Markov chain with one step per round.

    It turns bad with probability `begin`, good with `end`, and loses a reply with `loss_good` or `loss_bad`. Bad
    lasts 1 / `end` rounds on average; a share `begin` / (`begin` + `end`) of all rounds is bad, from the first on.

    E. N. Gilbert, "Capacity of a Burst-Noise Channel", BSTJ 39, 1960: his P is `begin`, p `end`, 1 − h `loss_bad`.
    E. O. Elliott, "Estimates of Error Rates for Codes on Burst-Noise Channels", BSTJ 42, 1963: 1 − k `loss_good`.
    """

    begin: Probability
    end: Probability
    loss_good: Probability = 0.0
    loss_bad: Probability = 1.0

    def __post_init__(self) -> None:
        _validate(self)
        if self.begin + self.end == 0:
            raise ConfigError("begin, end: expected one of them above 0, got 0 and 0.")


@dataclass(frozen=True, slots=True)
class Event:
    """What goes wrong with one client in one round; without a client, `crash` is the server's."""

    round: int
    client: str | None = None
    lost: bool = False
    delay: float = 0.0
    duplicate: bool = False
    crash: bool = False

    def __post_init__(self) -> None:
        _validate(self)
        if self.client is None and (self.lost or self.delay or self.duplicate):
            raise ConfigError("client: expected whose reply is lost, late or doubled, got none.")


@dataclass(frozen=True, slots=True)
class Faults:
    """A schedule, by default without faults. Fields: see the module; ConfigError names an invalid one."""

    drop: Probability = 0.0
    seed: int = 0
    rates: Mapping[str, Probability] = field(default_factory=dict)
    start_round: int = 1
    groups: Mapping[str, Probability] = field(default_factory=dict)
    bursts: Bursts | None = None
    late: Probability = 0.0
    mean_delay: float = 1.0
    duplicate: Probability = 0.0
    client_crash: Probability = 0.0
    server_crash_rounds: tuple[int, ...] = ()
    events: tuple[Event, ...] = ()
    _said: dict[tuple[str, int, str | None], float] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _validate(self)
        object.__setattr__(self, "rates", dict(self.rates))  # copies, so that nobody else can change a schedule
        object.__setattr__(self, "groups", dict(self.groups))
        kinds = ("lost", "delay", "duplicate", "crash")
        said = {(kind, e.round, e.client): v for e in self.events for kind in kinds if (v := getattr(e, kind))}
        object.__setattr__(self, "_said", said)

    @classmethod
    def from_json(cls, text: str) -> Faults:
        """Return the schedule in a JSON object with any of the fields, as `to_json` writes it."""
        try:
            given = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"faults: expected JSON, got {text!r} ({error}).") from None
        return _build(cls, given, "faults")

    def to_json(self) -> str:
        """Return the schedule as one line of JSON, without fields that have their default."""
        return json.dumps(self, default=_plain)

    @classmethod
    def from_trace(cls, path: str | Path) -> Faults:
        """Return the schedule that has exactly the events of a JSON Lines file."""
        try:
            events = [json.loads(line) for line in Path(path).read_text("utf-8").split("\n") if line.strip()]
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: expected a file of JSON lines ({error}).") from None
        return _build(cls, {"events": events}, str(path))

    def trace(self, rounds: Iterable[int], clients: Iterable[str]) -> str:
        """Return what happens to the server and these clients in these rounds, as JSON Lines for `from_trace`.

        >>> print(Faults(rates={"7": 1.0}).trace([3], ["6", "7"]), end="")
        {"round": 3, "client": "7", "lost": true}
        """
        clients, events = list(clients), []
        for k in rounds:
            events.append(Event(k, crash=self.server_crashes(k)))
            for c in clients:
                said = (self.loses(k, c), self.delay(k, c), self.duplicates(k, c), self.client_crashes(k, c))
                events.append(Event(k, c, *said))
        return "".join(f"{json.dumps(e, default=_plain)}\n" for e in events if e != Event(e.round, e.client))

    def loses(self, server_round: int, client_id: str) -> bool:
        """Return whether this client's reply of this round is lost on its way."""
        groups = (rate for pattern, rate in self.groups.items() if fnmatchcase(client_id, pattern))
        rate = self.rates[client_id] if client_id in self.rates else max(groups, default=self.drop)
        if self._happens("lost", rate, server_round, client_id):
            return True
        if self.bursts is None or server_round < self.start_round:
            return False
        length = 256 << (server_round // 256).bit_length()  # a power of two: few lengths, so few computations
        is_bad = _chain(self.bursts, self.seed, client_id, length)[server_round]
        loss = self.bursts.loss_bad if is_bad else self.bursts.loss_good
        return self._happens("burst", loss, server_round, client_id)

    def delay(self, server_round: int, client_id: str) -> float:
        """Return by how many seconds this client's reply is late, 0 to 1e9, to a microsecond if drawn."""
        seconds = self._said.get(("delay", server_round, client_id), 0.0)
        if self._happens("late", self.late, server_round, client_id):
            u = _rng("late", self.seed, server_round, client_id).random(2)[1]  # the first decided whether
            drawn = round(-self.mean_delay * math.log1p(-u), 6)  # a logarithm's last digit depends on the machine
            seconds = max(seconds, min(drawn, 1e9))
        return seconds

    def duplicates(self, server_round: int, client_id: str) -> bool:
        """Return whether this client's reply of this round arrives twice."""
        return self._happens("duplicate", self.duplicate, server_round, client_id)

    def client_crashes(self, server_round: int, client_id: str) -> bool:
        """Return whether this client crashes in this round: it forgets what is in memory and does not answer."""
        return self._happens("crash", self.client_crash, server_round, client_id)

    def server_crashes(self, server_round: int) -> bool:
        """Return whether the server crashes in this round."""
        return server_round in self.server_crash_rounds or ("crash", server_round, None) in self._said

    def _happens(self, kind: str, probability: float, server_round: int, client_id: str) -> bool:
        if (kind, server_round, client_id) in self._said:
            return True
        if probability == 0 or server_round < self.start_round:
            return False
        return probability == 1 or bool(_rng(kind, self.seed, server_round, client_id).random() < probability)


def _rng(kind: str, seed: int, server_round: int, client_id: str) -> np.random.Generator:
    return np.random.default_rng([seed, server_round, zlib.crc32(client_id.encode()), *_STREAMS[kind]])


@functools.lru_cache(maxsize=2**14)
def _chain(bursts: Bursts, seed: int, client_id: str, length: int) -> bytes:
    """Return 1 for each of the first rounds with the client in the bad state; a longer chain begins the same."""
    first, *rest = _rng("chain", seed, 0, client_id).random(length).tolist()
    begin, stay, share = bursts.begin, 1 - bursts.end, bursts.begin / (bursts.begin + bursts.end)
    return bytes(itertools.accumulate(rest, lambda bad, u: u < (stay if bad else begin), initial=first < share))


def _is_number(value: object, most: float) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= most


_LAWS: Final[dict[str, tuple[str, Callable[[Any], bool]]]] = {  # what a field's annotation requires
    "Probability": ("a probability, 0 to 1", lambda v: _is_number(v, 1)),
    "float": ("seconds, 0 to 1e9", lambda v: _is_number(v, 1e9)),
    "int": ("a whole number, 0 or more", lambda v: isinstance(v, int) and _is_number(v, math.inf)),
    "bool": ("true or false", lambda v: isinstance(v, bool)),
    "str | None": ("a client id, as text", lambda v: isinstance(v, str | None)),
    "Bursts | None": ("bursts", lambda v: isinstance(v, Bursts | None)),
    "tuple[int, ...]": ("rounds", lambda v: isinstance(v, tuple) and all(map(_LAWS["int"][1], v))),
    "tuple[Event, ...]": ("events", lambda v: isinstance(v, tuple) and all(isinstance(e, Event) for e in v)),
    "Mapping[str, Probability]": (
        "probabilities, 0 to 1, each with a client id or pattern as its key",
        lambda v: isinstance(v, Mapping) and all(isinstance(k, str) and _is_number(p, 1) for k, p in v.items()),
    ),
}


def _validate(value: Bursts | Event | Faults) -> None:
    for each in (each for each in fields(value) if each.init):
        expected, holds = _LAWS[str(each.type)]
        if not holds(given := getattr(value, each.name)):
            raise ConfigError(f"{each.name}: expected {expected}, got {given!r}.")


def _build(cls: type[T], given: Any, where: str) -> T:
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: expected a JSON object, got {given!r}.")
    known = {each.name: each for each in fields(cls) if each.init}
    needed = {name for name, each in known.items() if each.default is each.default_factory is MISSING}
    if wrong := sorted((given.keys() - known) | (needed - given.keys())):
        raise ConfigError(f"{where}: unknown or missing key {wrong[0]!r}. Known: {', '.join(known)}.")
    nested: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    if isinstance(value := given.get("bursts"), dict):
        nested["bursts"] = _build(Bursts, value, f"{where}: bursts")
    if isinstance(value := given.get("events"), list):
        nested["events"] = tuple(_build(Event, e, f"{where}: events[{i}]") for i, e in enumerate(value))
    try:
        return cls(**nested)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def _plain(value: Any) -> dict[str, Any]:  # without fields at their defaults
    return {f.name: v for f in fields(value) if f.init and (v := getattr(value, f.name)) not in (f.default, {})}
