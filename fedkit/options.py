"""The options of the `fedkit` command."""

from __future__ import annotations

import argparse
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

RUN_OPTIONS: Final[dict[str, dict[str, Any]]] = {  # shared by `fedkit run` and `fedkit plan`
    "--strategy": {"metavar": "NAME", "help": "run-config key `strategy`"},
    "--compare": {
        "action": "append",
        "metavar": "NAME",
        "help": "run this strategy too; compare with the first of them",
    },
    "--seeds": {"type": int, "default": 1, "metavar": "N", "help": "run each strategy with N seeds"},
    "--drop": {"type": float, "metavar": "P", "help": "probability that a reply is lost"},
    "--rounds": {"type": int, "metavar": "N", "help": "run-config key `num-rounds`"},
    "--run-config": {"nargs": "+", "action": "extend", "default": [], "metavar": "KEY=VALUE"},
    "--superlink": {"metavar": "NAME", "help": "a SuperLink in Flower's config; default: simulation here"},
    "--out": {"type": Path, "metavar": "DIR", "help": "default: fedkit-runs/APP-TIME"},
    "--tensorboard": {"metavar": "DIR", "help": "write event files there, too, round by round"},
    "--mlflow": {"metavar": "URI", "help": "log to this tracking server, too, round by round"},
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of `fedkit`'s command line."""
    parser = argparse.ArgumentParser(prog="fedkit", description="Federated fine-tuning with Flower.")
    parser.add_argument("--version", action="version", version=f"fedkit {version('fedkit')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    command = commands.add_parser("run", help="run a Flower App, in simulation or at a SuperLink, and compare")
    add_run_options(command, "APP_DIR", "directory with the app's pyproject.toml")
    command = commands.add_parser("resume", help="continue a `fedkit run` that did not finish")
    command.add_argument("run_dir", type=Path, metavar="RUN", help="the folder of the run, or of one arm in it")
    command = commands.add_parser("plan", help="estimate what a run will cost, before it is run")
    add_run_options(command, "APP", "as in `fedkit run`, or the folder of a run")
    command.add_argument("--rehearse", type=int, default=3, metavar="N", help="rounds to rehearse; default: 3")
    command.add_argument(
        "--train",
        action="store_true",
        help="let the clients train in the rehearsal, which takes longer, and count skips",
    )
    command = commands.add_parser("report", help="write a page that compares runs, finished or not")
    command.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the folder of a run, or of one arm")
    command.add_argument("--out", type=Path, metavar="FILE", help="default: report.html in the first RUN")
    command = commands.add_parser("doctor", help="check whether this machine, and an app, are ready for fedkit")
    command.add_argument("app_dir", nargs="?", type=Path, metavar="APP_DIR", help="look at this app, too")
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def add_run_options(command: argparse.ArgumentParser, name: str, meaning: str) -> None:
    """Add an argument for the app, and `RUN_OPTIONS`."""
    command.add_argument("app_dir", type=Path, metavar=name, help=meaning)
    for flag, how in RUN_OPTIONS.items():
        command.add_argument(flag, **how)


def given_options(arguments: argparse.Namespace) -> list[str]:
    """Return which of `RUN_OPTIONS` were given a value other than their default."""
    values = vars(arguments)
    return [
        flag
        for flag, how in RUN_OPTIONS.items()
        if values[flag.removeprefix("--").replace("-", "_")] != how.get("default")
    ]
