"""Run config, typed and validated: Flower's `[tool.flwr.app.config]` as a frozen dataclass.

An app declares its keys once, as the fields of a `RunConfig` subclass; a key `local-steps` is the field
`local_steps`. There is no second configuration language.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, TypeAlias, TypeVar, get_origin, get_type_hints

from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.limits import Limits

RUNS_DIR: Final = "FEDKIT_RUNS_DIR"
Scalar: TypeAlias = bool | int | float | str

T = TypeVar("T", bound="RunConfig")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """The keys that every fedkit app understands."""

    strategy: str = "aquila"  # a name that `fedkit.strategies.build` knows
    strategy_options: str = ""  # for its constructor; pairs as in `--run-config`: "rate=0.5 missing='mifa'"
    num_rounds: int = 10
    num_clients: int = 10  # nodes in simulation; in deployment, how many the server waits for
    seed: int = 0
    drop: float = 0.0  # probability that a reply is lost, for experiments
    quorum: float = 0.0  # of a round; for this, `grace` and `deadline` see `fedkit.limits.Limits`
    grace: float = -1.0  # seconds; below 0: until the deadline
    deadline: float = 0.0  # seconds; 0: Flower's default of an hour
    faults: str = ""  # other faults, for experiments: the JSON of a `fedkit.faults.Faults`
    run_dir: str = ""  # of the server; see `folder`

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ConfigError(f"num-rounds must be at least 1, got {self.num_rounds}.")
        if self.num_clients < 1:
            raise ConfigError(f"num-clients must be at least 1, got {self.num_clients}.")
        if not 0 <= self.drop < 1:
            raise ConfigError(f"drop must be at least 0 and below 1, got {self.drop}.")
        self.schedule()
        self.limits()

    @property
    def folder(self) -> Path | None:
        """Where the server writes rounds.jsonl, its checkpoint and the model; None: nowhere.

        A relative `run-dir` is relative to the folder in the server's environment variable `FEDKIT_RUNS_DIR`.
        """
        return Path(os.environ.get(RUNS_DIR, ""), self.run_dir) if self.run_dir else None

    def limits(self) -> Limits:
        """Return how long a round may last, and how many replies it needs."""
        return Limits(self.quorum, self.grace if self.grace >= 0 else None, self.deadline or None)

    def schedule(self, **more: Any) -> Faults:
        """Return the fault schedule: `faults`, or none; with `drop`, if that is set, and the fields in `more`."""
        faults = Faults.from_json(self.faults) if self.faults else Faults(seed=self.seed)
        if self.drop:
            more["drop"] = self.drop
        return dataclasses.replace(faults, **more)


def parse(cls: type[T], run_config: Mapping[str, Scalar]) -> T:
    """Return the run config of a Flower `Context` as a `cls`.

    Raises
    ------
    ConfigError
        For an unknown key, naming the nearest known one, and for a value whose type is not its field's.
    """
    types = get_type_hints(cls)
    keys = {name for name, kind in types.items() if get_origin(kind) is not ClassVar}
    if keys - {field.name for field in dataclasses.fields(cls)}:
        raise ConfigError(
            f"{cls.__name__}: its keys are no fields. Put @dataclass(frozen=True, kw_only=True) before it."
        )
    fields = {field.name.replace("_", "-"): field.name for field in dataclasses.fields(cls)}
    check_keys(run_config, fields)
    values: dict[str, Any] = {
        fields[key]: as_type(key, value, types[fields[key]]) for key, value in run_config.items()
    }
    return cls(**values)


def check_keys(keys: Iterable[str], known: Iterable[str], *, what: str = "run-config key") -> None:
    """Check that every key is a known one.

    Raises
    ------
    ConfigError
        Naming the first unknown key and the known one nearest to it.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known: {', '.join(sorted(known))}."
            raise ConfigError(f"unknown {what} {key!r}. {hint}")


def parse_overrides(texts: Sequence[str], *, what: str = "run-config") -> dict[str, Scalar]:
    """Return the `key=value` pairs of Flower's `--run-config`, values in TOML.

    >>> parse_overrides(["seed=3 strategy='fedavg'", "drop=0.4"])
    {'seed': 3, 'strategy': 'fedavg', 'drop': 0.4}

    Raises
    ------
    ConfigError
        For text that is not a list of `key=value` pairs.
    """
    pairs: dict[str, Scalar] = {}
    for text in texts:
        for pair in _split_pairs(text):
            try:
                pairs |= tomllib.loads(pair)
            except tomllib.TOMLDecodeError as error:
                raise ConfigError(
                    f"{what}: expected key=value, got {pair!r} ({error}). Quote strings: key='text'."
                ) from None
    return pairs


def _split_pairs(text: str) -> list[str]:
    """Split at blanks that are not inside quotes."""
    pairs, quote = [""], ""
    for char in text:
        if char.isspace() and not quote:
            pairs.append("")
            continue
        if char in "\"'":
            quote = "" if quote == char else quote or char
        pairs[-1] += char
    return [pair for pair in pairs if pair]


def as_type(key: str, value: Scalar, expected: type) -> Scalar:
    """Return the value if it has the expected type, an int as float if needed; else raise ConfigError."""
    if expected is float and type(value) is int:
        return float(value)
    if type(value) is not expected:
        raise ConfigError(
            f"run-config key {key!r}: expected {expected.__name__}, got {type(value).__name__} {value!r}."
        )
    return value
