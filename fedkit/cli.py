"""The `fedkit` command.

`fedkit run APP_DIR` runs a Flower App once per strategy and seed, one such *arm* after the other, and compares the
arms: in simulation, or with `--superlink NAME` at a SuperLink named in Flower's config. Every arm leaves a
directory with `run.json` (what was asked), `rounds.jsonl` (what happened) and `flower.log`. `fedkit plan`
estimates what a run will cost, `fedkit resume RUN` continues an interrupted run, `fedkit report RUN` makes a page
about it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Final

from rich.console import Console

from fedkit.display import finding_line, live_display, make_console, show
from fedkit.doctor import examine
from fedkit.errors import ConfigError, FedkitError, OutcomeError
from fedkit.files import write_json
from fedkit.forecast import forecast, forecast_table, remarks
from fedkit.launch import SuperLink
from fedkit.ledger import ROUNDS
from fedkit.options import build_parser, given_options
from fedkit.outcome import check_outcome
from fedkit.plan import NAME as PLAN
from fedkit.plan import Arm, Plan, plan_arms, read_app, unused
from fedkit.processes import end_processes
from fedkit.record import completed, recorded
from fedkit.report import Row, read_rounds
from fedkit.report.figures import summarise
from fedkit.report.page import write_page
from fedkit.report.tables import summary_table
from fedkit.state import STATE_DIR
from fedkit.submit import Connection
from fedkit.trackers import TRACKERS, check_trackers, tracking

REPORT = "report.html"
RUN_MARK = "FEDKIT_RUN"  # an environment variable of all that a command starts: the run's folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return 0; 1: run failed, or `doctor` found a problem; 2: wrong option; 130: interrupted."""
    arguments = build_parser().parse_args(argv)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # An exception, so that every `with` and `finally` runs; the exit code is as in a shell.
        signal.signal(number, lambda number, frame: sys.exit(128 + number))
    try:
        return COMMANDS[arguments.command](arguments) or 0
    except FedkitError as error:
        complain(str(error), error)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt as error:
        complain("interrupted.", error)
        return 130
    except SystemExit as error:
        complain("terminated.", error)
        raise


def complain(text: str, error: BaseException) -> None:
    """Print what is wrong, and the notes on what to do."""
    print("\n".join([f"fedkit: {text}", *getattr(error, "__notes__", [])]), file=sys.stderr)


def run(arguments: argparse.Namespace) -> None:
    """Carry out `fedkit run`: check everything, then run every arm, then compare.

    Raises ConfigError before anything starts, LaunchError for the first run that fails.
    """
    plan, out = new_plan(arguments)
    plan.save()
    with plan.locked():
        carry_out(plan, plan.arms, out)


def new_plan(arguments: argparse.Namespace) -> tuple[Plan, Path]:
    """Return the plan that the options of `fedkit run` ask for, and its folder as given; raises ConfigError."""
    app, defaults = read_app(arguments.app_dir)
    out = arguments.out or unused(Path("fedkit-runs", f"{app}-{time.strftime('%Y%m%d-%H%M%S')}"))
    arms = plan_arms(arguments, defaults, out.resolve())
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out: expected a new or an empty directory, got {out}. Choose another one.")
    wanted = {name: vars(arguments)[name] for name in TRACKERS}
    trackers = check_trackers({name: target for name, target in wanted.items() if target})
    app_dir, folder = arguments.app_dir.resolve(), out.resolve()
    plan = Plan(
        folder, app, app_dir, (arguments.compare or [None])[0], arms, arguments.superlink, trackers=trackers
    )
    return plan, out


def foresee(arguments: argparse.Namespace) -> None:
    """Carry out `fedkit plan`: print what a run will cost; save it with that run, begun or still to come.

    Raises
    ------
    ConfigError
        As `run`.
    LaunchError
        If the app's server cannot be rehearsed here.
    """
    begun = (arguments.app_dir / PLAN).exists()
    if begun and (given := given_options(arguments)):
        raise ConfigError(f"{arguments.app_dir} is a run, with options of its own. Leave out {', '.join(given)}.")
    if arguments.rehearse < 1:
        raise ConfigError(f"--rehearse: expected at least 1 round, got {arguments.rehearse}.")
    plan, out = (Plan.load(arguments.app_dir), arguments.app_dir) if begun else new_plan(arguments)
    forecasts = forecast(plan, arguments.rehearse, train=arguments.train)
    make_console().print(forecast_table(forecasts), *remarks(forecasts), sep="\n")
    if not begun and not arguments.out:
        return
    if not begun:
        plan.save()
        print(f"Kept in {out}/. Carry it out with: fedkit resume {shlex.quote(str(out))}")
    for arm in plan.arms:
        forecasts[arm.strategy].save(arm.run_dir)


def resume(arguments: argparse.Namespace) -> None:
    """Carry out `fedkit resume`: run what a `fedkit run` left undone, and compare as if nothing had happened.

    Raises as `run`.
    """
    out, name = arguments.run_dir, None
    if (out / "run.json").exists() and not (out / "plan.json").exists():
        out, name = out.resolve().parent, out.resolve().name
    plan = Plan.load(out)
    with plan.locked():
        arms = [arm for arm in plan.arms if name in (None, arm.run_dir.name)]
        if not all(map(completed, arms)):
            plan.check_app()
            if plan.fedkit != version("fedkit"):
                versions = f"fedkit {plan.fedkit}, this is {version('fedkit')}"
                print(f"fedkit: warning: this run was begun with {versions}: results may differ.", file=sys.stderr)
            end_processes(f"{RUN_MARK}={plan.folder}")  # left by a command that was killed before ending them
        carry_out(plan, arms, out)


def report(arguments: argparse.Namespace) -> None:
    """Carry out `fedkit report`; raises ConfigError."""
    out = arguments.out or arguments.runs[0] / REPORT
    try:
        write_page(arguments.runs, out)
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out} ({error}). Choose another file.") from None
    print(f"Wrote {out}: open it in a browser.")


def doctor(arguments: argparse.Namespace) -> int:
    """Carry out `fedkit doctor`; return 1 if it found a problem, else 0."""
    findings = list(examine(arguments.app_dir))
    if arguments.json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        make_console().print(*map(finding_line, findings), sep="\n", soft_wrap=True)
    return int(any(finding.level == "problem" for finding in findings))


def carry_out(plan: Plan, arms: Sequence[Arm], out: Path) -> None:
    """Run the arms that are not completed and show all arms; compare them once the whole plan is completed."""
    console = make_console()
    left = [arm for arm in arms if not completed(arm)]
    for arm in (arm for arm in arms if arm not in left):
        show(console, arm)
    if left:
        begin = (
            "Starting Flower." if plan.superlink is None else f"Submitting to the SuperLink {plan.superlink!r}."
        )
        console.print(f"{begin} Everything goes to {out}/", soft_wrap=True)
        with resumable(out):
            run_arms(console, plan, left)
    else:
        console.print(f"Nothing is left to do in {out}/", soft_wrap=True)
    if not all(map(completed, plan.arms)):
        return
    runs: dict[str, list[list[Row]]] = {arm.strategy: [] for arm in plan.arms}
    for arm in plan.arms:
        runs[arm.strategy].append(read_rounds(arm.run_dir / ROUNDS))
    summary = summarise(runs, plan.compare)
    write_json(plan.folder / "summary.json", summary)
    if len(plan.arms) > 1:
        console.print(summary_table(summary))
    console.print(f"See all of it: fedkit report {shlex.quote(str(out))}", soft_wrap=True)


def run_arms(console: Console, plan: Plan, arms: Sequence[Arm]) -> None:
    """Run the arms, one after the other; raises LaunchError for the first that fails."""
    with superlink_of(plan) as superlink:
        for arm in arms:
            with (
                recorded(arm, plan.app, plan.app_dir),
                tracking(arm, plan.app, plan.trackers) as track,
                live_display(console, arm) as tell,
            ):
                superlink.run(plan.app_dir, arm.config, arm.run_dir, in_turn(tell, track))
                warnings = check_outcome(arm)
            show(console, arm, warnings)


def in_turn(*takers: Callable[[Row], None]) -> Callable[[Row], None]:
    """Return a callable that passes each round to all of `takers`."""

    def take(row: Row) -> None:
        for taker in takers:
            taker(row)

    return take


def superlink_of(plan: Plan) -> Connection:
    """Return the SuperLink connection that runs a plan's arms."""
    if plan.superlink:
        return Connection(plan.superlink)
    settings = {STATE_DIR: str(plan.folder / "clients"), RUN_MARK: str(plan.folder)}
    return SuperLink(plan.folder / "superlink.log", settings)


@contextmanager
def resumable(out: Path) -> Iterator[None]:
    """Add to any error that ends a run how to resume it."""
    try:
        yield
    except BaseException as error:
        again = f"Take it up with: fedkit resume {shlex.quote(str(out))}"
        error.add_note("Mend the app, and start another run." if isinstance(error, OutcomeError) else again)
        raise


COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], int | None]]] = {
    "run": run,
    "resume": resume,
    "plan": foresee,
    "report": report,
    "doctor": doctor,
}

if __name__ == "__main__":
    sys.exit(main())
