"""The plan of a `fedkit run`: its arms, as given on the command line, saved in `plan.json` to be resumed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import secrets
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, Final, Self

from fedkit.config import RunConfig, Scalar, as_type, check_keys, parse, parse_overrides
from fedkit.errors import ConfigError
from fedkit.files import exclusive, write_json
from fedkit.strategies import STRATEGIES, build

NAME: Final = "plan.json"
DRIVEN_KEYS = ("run-dir", "strategy", "seed", "num-rounds", "num-clients")  # what `fedkit run` sets or reads
COMMON: Final = {field.name.replace("_", "-"): field.default for field in dataclasses.fields(RunConfig)}


@dataclass(frozen=True)
class Arm:
    """One run of the app, with its full run config."""

    config: Mapping[str, Scalar]
    run_dir: Path  # where all its files go, on this machine

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return str(self.config["strategy"])

    @property
    def elsewhere(self) -> bool:
        """Whether the server writes into a folder of its own machine."""
        return self.config["run-dir"] != str(self.run_dir)

    @property
    def title(self) -> str:
        """The name of this arm in output for the user."""
        return f"{self.strategy}, seed {self.config['seed']}"


@dataclass(frozen=True)
class Plan:
    """Everything that one command runs, in one folder."""

    folder: Path
    app: str
    app_dir: Path
    compare: str | None  # the strategy that the others are compared with
    arms: list[Arm]
    superlink: str | None = None  # its name in Flower's config; None: one of our own, which simulates
    fedkit: str = version("fedkit")  # the version that began it
    trackers: Mapping[str, str] = field(default_factory=dict)  # where each one writes: `fedkit.trackers`

    def save(self) -> None:
        """Write the plan into its folder; raises StateError."""
        here = set() if self.superlink else {"run-dir"}  # it is in this folder, which may be moved
        arms = [
            {"name": arm.run_dir.name, "run-config": {k: v for k, v in arm.config.items() if k not in here}}
            for arm in self.arms
        ]
        plan = {"fedkit": self.fedkit, "app": self.app, "app-dir": str(self.app_dir), "compare": self.compare}
        how = {"superlink": self.superlink, "trackers": dict(self.trackers)}
        write_json(self.folder / NAME, plan | how | {"arms": arms})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Return the plan that is saved in a folder.

        Raises
        ------
        ConfigError
            If there is none, or it cannot be read.
        """
        folder = folder.resolve()
        path = folder / NAME
        try:
            plan = json.loads(path.read_text(encoding="utf-8"))
            arms = [
                Arm({"run-dir": str(folder / arm["name"]), **arm["run-config"]}, folder / arm["name"])
                for arm in plan["arms"]
            ]
            app, compare, superlink = plan["app"], plan["compare"], plan.get("superlink")
            trackers = plan.get("trackers", {})
            return cls(folder, app, Path(plan["app-dir"]), compare, arms, superlink, plan["fedkit"], trackers)
        except OSError:
            got = f"no {NAME} in it" if folder.exists() else "none of that name"
            raise ConfigError(f"{folder}: expected the folder of a `fedkit run`, got {got}.") from None
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path}: expected what `fedkit run` wrote, got {error!r}. Was it damaged?"
            ) from None

    def check_app(self) -> None:
        """Check that the app is still what the arms were planned for.

        Raises
        ------
        ConfigError
            If it is gone, or has other keys, or keys of other types.
        """
        what = "Put back what was there, or start another run."
        if not self.app_dir.is_dir():
            raise ConfigError(f"the app: expected a directory {self.app_dir}, got none. {what}")
        _, defaults = read_app(self.app_dir)
        for arm in self.arms:
            if others := sorted(defaults.keys() ^ arm.config.keys()):
                keys = ", ".join(map(repr, others))
                raise ConfigError(
                    f"{self.app_dir}: expected the run-config keys that it had when {self.folder} was begun, "
                    f"got a difference in {keys}. {what}"
                )
            for key, value in arm.config.items():
                as_type(key, value, type(defaults[key]))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other commands out of the folder; the lock ends with the process, however it ends.

        Raises
        ------
        ConfigError
            If another command holds the lock.
        """
        busy = (
            f"{self.folder}: expected a run that has ended, got one that another command is at. "
            "Wait for it, or interrupt it."
        )
        with exclusive(self.folder / NAME, busy):
            yield


def unused(folder: Path) -> Path:
    """Return a folder that does not exist yet: this one, or one with a number after its name."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return folder if not folder.exists() else next(each for each in numbered if not each.exists())


def read_app(app_dir: Path) -> tuple[str, dict[str, Scalar]]:
    """Return an app's name and its run config's defaults, nested tables as dotted keys, as Flower has it.

    Raises
    ------
    ConfigError
        If the directory holds no Flower App, or one without the keys that `fedkit run` sets.
    """
    path = app_dir / "pyproject.toml"
    try:
        project = tomllib.loads(path.read_text(encoding="utf-8"))
        name, app = str(project["project"]["name"]), project["tool"]["flwr"]["app"]
    except OSError as error:
        raise ConfigError(f"expected the directory of a Flower App, got {app_dir} ({error}).") from None
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(f"{path} does not describe a Flower App: {error!r}.") from None
    defaults = dict(flatten(app.get("config", {})))
    if lacking := [key for key in DRIVEN_KEYS if key not in defaults]:
        keys = ", ".join(map(repr, lacking))
        raise ConfigError(
            f"{path}: [tool.flwr.app.config] lacks {keys}, which `fedkit run` drives. Add them, and let the "
            'server read them: see "What `fedkit run` needs of an app" in strategies/README.md.'
        )
    return name, defaults


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """Yield the values of nested tables under dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def common(config: Mapping[str, Scalar]) -> RunConfig:
    """Return fedkit's own keys of a run config, checked; raises ConfigError."""
    keys = {field.name.replace("_", "-") for field in dataclasses.fields(RunConfig)}
    return parse(RunConfig, {key: value for key, value in config.items() if key in keys})


@contextmanager
def flower_silent() -> Iterator[None]:
    """Let Flower log only errors, as when a strategy is built only to check it."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def plan_arms(arguments: argparse.Namespace, defaults: Mapping[str, Scalar], out: Path) -> list[Arm]:
    """Return the arms, strategy by strategy, with checked run configs.

    Raises
    ------
    ConfigError
        For a key that the app does not have, or a value of another type or out of range.
    """
    options = {"strategy": arguments.strategy, "num-rounds": arguments.rounds, "drop": arguments.drop}
    given = parse_overrides(arguments.run_config) | {k: v for k, v in options.items() if v is not None}
    for key in sorted((given.keys() - defaults.keys()) & COMMON.keys()):
        raise ConfigError(
            f"run-config key {key!r}: the app has to declare it. Add it to [tool.flwr.app.config] in its "
            f"pyproject.toml, with a default: {key} = {json.dumps(COMMON[key])}"
        )
    check_keys(given, defaults)
    if "run-dir" in given:
        raise ConfigError("run-config key 'run-dir' is set by `fedkit run`. Use --out.")
    given = {key: as_type(key, value, type(defaults[key])) for key, value in given.items()}
    if arguments.seeds < 1:
        raise ConfigError(f"--seeds: expected at least 1, got {arguments.seeds}.")
    config = {**defaults, **given}
    checked = common(config)
    if not config["strategy"]:
        raise ConfigError("strategy: expected a name, got ''.")
    strategies = dict.fromkeys([str(config["strategy"]), *(arguments.compare or [])])
    if defaults["strategy"] in STRATEGIES:  # else the app has strategy names of its own
        check_keys(strategies, STRATEGIES, what="strategy")
        with flower_silent():
            build(dataclasses.replace(checked, run_dir=""))  # checks its options, before anything is started
    seeds = range(int(config["seed"]), int(config["seed"]) + arguments.seeds)
    none = {"strategy-options": ""} if "strategy-options" in config else {}  # options are one strategy's
    # On another machine, a folder that no other run has: a run continues from what it finds there.
    server = f"{out.name}-{secrets.token_hex(4)}" if arguments.superlink else str(out)
    return [
        Arm({**config, **own, "strategy": name, "seed": seed, "run-dir": f"{server}/{arm}"}, out / arm)
        for name in strategies
        for own in [{} if name == config["strategy"] else none]
        for seed in seeds
        for arm in [f"{name}-seed{seed}"]
    ]
