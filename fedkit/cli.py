"""The `fedkit` command.

`fedkit run APP_DIR` runs a Flower App in simulation, once per strategy and seed, one *arm* after the
other on one SuperLink, and compares them. Every arm leaves a directory with `run.json` (what was asked),
`rounds.jsonl` (what happened) and `flower.log`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn

from fedkit.config import RunConfig, Scalar, as_type, check_keys, parse, parse_overrides
from fedkit.errors import ConfigError, FedkitError
from fedkit.launch import SuperLink
from fedkit.report import Row, news, read_rounds, round_table, summarise, summary_table, totals_line
from fedkit.strategies import STRATEGIES

DRIVEN_KEYS = ("run-dir", "strategy", "seed", "num-rounds", "num-clients")  # what `fedkit run` sets or reads


@dataclass(frozen=True)
class Arm:
    """One run of the app, with its full run config."""

    config: Mapping[str, Scalar]

    @property
    def strategy(self) -> str:
        """The strategy's name."""
        return str(self.config["strategy"])

    @property
    def run_dir(self) -> Path:
        """Where everything about this arm goes."""
        return Path(str(self.config["run-dir"]))

    @property
    def title(self) -> str:
        """How this arm is called in what the user reads."""
        return f"{self.strategy}, seed {self.config['seed']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 0, 1 a run failed, 2 a wrong option, 130 interrupted."""
    arguments = build_parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # An exception, so that every `with` and `finally` runs; the exit code is a shell's.
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        run(arguments)
    except FedkitError as error:
        print(f"fedkit: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("fedkit: interrupted; everything that was started is stopped.", file=sys.stderr)
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `fedkit`'s command line."""
    parser = argparse.ArgumentParser(prog="fedkit", description="Federated fine-tuning with Flower.")
    parser.add_argument("--version", action="version", version=f"fedkit {version('fedkit')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("run", help="run a Flower App in simulation and compare strategies")
    command.add_argument("app_dir", type=Path, metavar="APP_DIR", help="directory with the app's pyproject.toml")
    command.add_argument("--strategy", metavar="NAME", help="run-config key `strategy`")
    command.add_argument("--compare", metavar="NAME", help="run this strategy too, and compare with it")
    command.add_argument("--seeds", type=int, default=1, metavar="N", help="run each strategy with N seeds")
    command.add_argument("--drop", type=float, metavar="P", help="probability that a reply is lost")
    command.add_argument("--rounds", type=int, metavar="N", help="run-config key `num-rounds`")
    command.add_argument("--run-config", nargs="+", action="extend", default=[], metavar="KEY=VALUE")
    command.add_argument("--out", type=Path, metavar="DIR", help="default: fedkit-runs/APP-TIME")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Carry out `fedkit run`: check everything, then run every arm, then compare.

    Raises ConfigError before anything starts, LaunchError for the first run that fails.
    """
    app, defaults = read_app(arguments.app_dir)
    out = arguments.out or Path("fedkit-runs", f"{app}-{time.strftime('%Y%m%d-%H%M%S')}")
    arms = plan_arms(arguments, defaults, out.resolve())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: expected a new or an empty directory, got {out}. Choose another one.")
    out.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False)
    runs: dict[str, list[list[Row]]] = {arm.strategy: [] for arm in arms}
    console.print(f"Starting Flower. Everything goes to {out}/", soft_wrap=True)
    with SuperLink(out / "superlink.log") as superlink:
        for arm in arms:
            with recorded(arm, app, arguments.app_dir), live_display(console, arm) as on_round:
                superlink.run(arguments.app_dir.resolve(), arm.config, arm.run_dir, on_round)
            rows = read_rounds(arm.run_dir / "rounds.jsonl")
            runs[arm.strategy].append(rows)
            console.print(round_table(rows, arm.title))
            console.print(totals_line(rows), soft_wrap=True)
    summary = summarise(runs, arguments.compare)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if len(arms) > 1:
        console.print(summary_table(summary))


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
    for key in (key for key in DRIVEN_KEYS if key not in defaults):
        raise ConfigError(f"{path}: [tool.flwr.app.config] lacks {key!r}, which `fedkit run` drives. Add it.")
    return name, defaults


def flatten(table: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Scalar]]:
    """Yield the values of nested tables under dotted keys."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def plan_arms(arguments: argparse.Namespace, defaults: Mapping[str, Scalar], out: Path) -> list[Arm]:
    """Return the arms, strategy by strategy, with checked run configs.

    Raises
    ------
    ConfigError
        For a key that the app does not have, or a value of another type or out of range.
    """
    options = {"strategy": arguments.strategy, "num-rounds": arguments.rounds, "drop": arguments.drop}
    given = parse_overrides(arguments.run_config) | {k: v for k, v in options.items() if v is not None}
    check_keys(given, defaults)
    if "run-dir" in given:
        raise ConfigError("run-config key 'run-dir' is set by `fedkit run`. Use --out.")
    given = {key: as_type(key, value, type(defaults[key])) for key, value in given.items()}
    if arguments.seeds < 1:
        raise ConfigError(f"--seeds: expected at least 1, got {arguments.seeds}.")
    config = {**defaults, **given}
    common = {field.name.replace("_", "-") for field in dataclasses.fields(RunConfig)}
    parse(RunConfig, {key: value for key, value in config.items() if key in common})
    strategies = dict.fromkeys([str(config["strategy"]), *([arguments.compare] if arguments.compare else [])])
    if defaults["strategy"] in STRATEGIES:  # else the app has names of its own
        check_keys(strategies, STRATEGIES, what="strategy")
    seeds = range(int(config["seed"]), int(config["seed"]) + arguments.seeds)
    return [
        Arm({**config, "strategy": name, "seed": seed, "run-dir": str(out / f"{name}-seed{seed}")})
        for name in strategies
        for seed in seeds
    ]


@contextmanager
def recorded(arm: Arm, app: str, app_dir: Path) -> Iterator[None]:
    """Keep `run.json` true: what runs, with which versions, and how it ended."""
    arm.run_dir.mkdir(parents=True)
    record = {
        "app": app,
        "strategy": arm.strategy,
        "seed": arm.config["seed"],
        "run-config": dict(arm.config),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in ("fedkit", "flwr")},
        "git-commit": git_commit(app_dir),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }

    def write(status: str) -> None:
        finished = None if status == "running" else datetime.now(UTC).isoformat(timespec="seconds")
        text = json.dumps({**record, "finished": finished, "status": status}, indent=2)
        (arm.run_dir / "run.json").write_text(text + "\n")

    write("running")
    try:
        yield
    except BaseException as error:
        write("failed" if isinstance(error, Exception) else "interrupted")
        raise
    write("completed")


def git_commit(directory: Path) -> str | None:
    """Return the commit checked out in a directory, `-dirty` appended if it was changed, None without git."""
    command = ["git", "-C", str(directory), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


@contextmanager
def live_display(console: Console, arm: Arm) -> Iterator[Callable[[Row], None]]:
    """Yield an `on_round` that shows how an arm gets on: a bar on a terminal, elsewhere a line per round."""
    num_rounds = int(arm.config["num-rounds"])
    rows: list[Row] = []
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), "{task.fields[news]}")
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(arm.title, total=num_rounds, news="starting Ray")

        def on_round(row: Row) -> None:
            rows.append(row)
            progress.update(task, completed=row["round"], news=news(rows))
            if not console.is_terminal:
                line = f"{arm.title}  round {row['round']}/{num_rounds}  {news(rows)}"
                console.print(line, soft_wrap=True)

        yield on_round


if __name__ == "__main__":
    sys.exit(main())
