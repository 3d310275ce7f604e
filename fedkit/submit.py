"""Runs at a SuperLink: submitted, followed and found again through Flower's command-line programs.

The interface of these programs changes less than Flower's modules do.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol, Self

from fedkit.config import Scalar
from fedkit.errors import LaunchError
from fedkit.follow import LogFollower, log_tail
from fedkit.ledger import ROUNDS
from fedkit.processes import POLL_SECONDS, program
from fedkit.record import LOG
from fedkit.report import Row

COMMAND_SECONDS: Final = 60.0  # for one `flwr ls`; it takes 1 s
AWAY_SECONDS: Final = 120.0  # how long a SuperLink may take to come back
NOWHERE: Final = "/"  # the working directory of `flwr`: elsewhere it may take a name for the folder of an app
RUN_ID: Final = "flower-run-id"


class Follower(Protocol):
    """Reports rounds."""

    def report(self) -> None:
        """Report the rounds since the last call."""


class Connection:
    """A SuperLink named in Flower's config: it is independent of fedkit, and runs continue when fedkit ends.

    Parameters
    ----------
    name : str
        ``[superlink.NAME]`` in ``config.toml`` in Flower's home.
    environment : mapping, optional
        Environment of the `flwr` commands; this process's own if unset.
    """

    def __init__(self, name: str, environment: Mapping[str, str] | None = None) -> None:
        self.name, self.environment = name, dict(os.environ if environment is None else environment)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the SuperLink alone."""

    def run(
        self, app_dir: Path, config: Mapping[str, Scalar], run_dir: Path, on_round: Callable[[Row], None]
    ) -> None:
        """Run an app, installed or not, and return once Flower calls the run completed.

        A run that was begun for the same `run_dir`, and still runs or was completed since, is not begun again.

        Parameters
        ----------
        app_dir, config
            A Flower App and its run config.
        run_dir
            A folder of this machine, for `rounds.jsonl`, `flower.log` and Flower's id of the run.
        on_round
            Called with each round as soon as it is known.

        Raises
        ------
        LaunchError
            If the run does not start or fails, with the end of its log, or if the SuperLink is gone.
        """
        run_id = self._begun(run_dir)
        if run_id is None:
            run_id = self._submit(app_dir, config, run_dir)
        rounds = self.follower(run_dir, on_round)
        try:
            entry = self._follow(run_id, run_dir / LOG, rounds)
            while not entry["status"].startswith("finished"):  # a stream ends early if its connection breaks
                entry = self._follow(run_id, run_dir / LOG, rounds)
        except BaseException as error:
            self.say_what_goes_on(error, run_id)
            raise
        if entry["status"] != "finished:completed":
            reason = f"the run ended as {entry['status']!r}: {entry['status-details']}"
            raise LaunchError(f"{reason}\n{log_tail(run_dir / LOG)}\nLog: {run_dir / LOG}")

    # ---- what differs for a SuperLink of our own -----------------------------------------------

    def options(self, config: Mapping[str, Scalar]) -> list[str]:
        """Return further options of `flwr run`."""
        return []

    def follower(self, run_dir: Path, on_round: Callable[[Row], None]) -> Follower:
        """Return the follower that reports rounds while the run's log is streamed."""
        return LogFollower(run_dir / LOG, run_dir / ROUNDS, on_round)

    def check_alive(self) -> None:
        """Raise LaunchError if waiting for the SuperLink is pointless."""

    def say_what_goes_on(self, error: BaseException, run_id: str) -> None:
        """Add a note to an error on what happens to the run."""
        error.add_note(f"The run goes on without this command. Stop it with: flwr stop {run_id} {self.name}")

    # ---- Flower's commands ---------------------------------------------------------------------

    def _begun(self, run_dir: Path) -> str | None:
        """Return the id of the run that was begun for a folder, unless it failed, was stopped, or is unknown."""
        path = run_dir / RUN_ID
        entry = self._entry(path.read_text()) if path.exists() else None
        wanted = entry is not None and entry["status"] not in ("finished:failed", "finished:stopped")
        return path.read_text() if wanted else None

    def _submit(self, app_dir: Path, config: Mapping[str, Scalar], run_dir: Path) -> str:
        """Begin a run; return its id."""
        overrides = run_dir / "run-config.toml"
        write_run_config(overrides, config)
        options = ["--run-config", str(overrides.resolve()), *self.options(config)]
        answer = self._command("run", str(app_dir.resolve()), self.name, *options)
        if "run-id" not in answer:
            raise LaunchError(f"Flower did not accept the app {app_dir}:\n{answer['error-message']}")
        (run_dir / RUN_ID).write_text(answer["run-id"])
        return str(answer["run-id"])

    def _follow(self, run_id: str, log: Path, rounds: Follower) -> dict[str, str]:
        """Stream a run's log from its beginning until the stream ends; return what `flwr ls` says then."""
        with log.open("wb") as file:  # a session of its own, since fedkit handles Ctrl-C
            stream = subprocess.Popen(
                [program("flwr"), "log", run_id, self.name, "--stream"],
                env=self.environment,
                cwd=NOWHERE,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        try:
            while stream.poll() is None:
                self.check_alive()
                rounds.report()
                time.sleep(POLL_SECONDS)
        finally:
            stream.kill()
            stream.wait()
        rounds.report()
        if (entry := self._entry(run_id)) is None:
            raise LaunchError(f"the SuperLink {self.name!r} does not know run {run_id} any more. Log: {log}")
        return entry

    def _entry(self, run_id: str) -> dict[str, str] | None:
        """Return what `flwr ls` says about a run; None if the SuperLink does not know it."""
        deadline = time.monotonic() + AWAY_SECONDS
        while True:
            self.check_alive()
            answer = self._command("ls", self.name, "--run-id", run_id)
            if "runs" in answer:
                entry: dict[str, str] = answer["runs"][0]
                return entry
            if "not found" in answer["error-message"].lower():
                return None
            if time.monotonic() > deadline:
                raise LaunchError(f"cannot ask the SuperLink about run {run_id}: {answer['error-message']}")
            time.sleep(1)

    def _command(self, *arguments: str) -> dict[str, Any]:
        """Return the JSON that a `flwr` command prints; if it fails, with an ``error-message``."""
        command = [program("flwr"), *arguments, "--format", "json"]
        try:
            done = subprocess.run(
                command, env=self.environment, cwd=NOWHERE, capture_output=True, timeout=COMMAND_SECONDS
            )
        except subprocess.TimeoutExpired:
            return {"error-message": f"no answer within {COMMAND_SECONDS:.0f} s"}
        said = (done.stdout + done.stderr).decode(errors="replace").strip()
        try:
            answer: dict[str, Any] = json.loads(done.stdout)
        except ValueError:
            answer = {}
        return answer if answer.get("success") else {"error-message": said} | answer


def write_run_config(path: Path, config: Mapping[str, Scalar]) -> None:
    """Write a run config as the TOML that `flwr run` takes."""
    path.write_text("".join(f"{key} = {to_toml(value)}\n" for key, value in config.items()), encoding="utf-8")


def to_toml(value: Scalar) -> str:
    """Return a run-config value in TOML, whose basic strings are JSON's."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, str)) else repr(value)
