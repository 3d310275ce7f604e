"""Flower's simulation as one context manager: it brings everything it needs and leaves nothing behind.

    with SuperLink(log) as superlink:
        superlink.run(app_dir, run_config, run_dir, on_round=print)

A `SuperLink` has its own Flower home, port, in-memory state and Ray, so any number of them, and the
user's own, live side by side on one machine. It is driven through Flower's command-line programs, whose
interface changes less than Flower's modules do. POSIX only.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from fedkit.config import Scalar
from fedkit.errors import LaunchError
from fedkit.report import RoundsFollower, Row, log_tail

START_SECONDS = 60.0  # until the SuperLink answers; it takes 2 s on two idle cores
COMMAND_SECONDS = 60.0  # for one `flwr ls`; it takes 1 s
STOP_SECONDS = 3.0  # for the polite end, and again for the forcible one
POLL_SECONDS = 0.1

# --- what may differ between Flower versions; the same from 1.39 to 1.41 ------------------------------


def superlink_arguments(port: int) -> list[str]:
    """Return the arguments of `flower-superlink`: simulation, all its APIs on one HTTP port."""
    return f"--insecure --simulation --isolation subprocess --host 127.0.0.1 --port {port}".split()


def flower_environment(home: Path) -> dict[str, str]:
    """Return the environment of every Flower and Ray process started here."""
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    programs = str(Path(sys.executable).parent)  # Flower starts its own programs by bare name
    return environment | {
        "PATH": os.pathsep.join([programs, environment.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",  # use the packages of this environment
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # instead of 1 s, paid once per run
        "OMP_NUM_THREADS": "1",  # one core per client: the threads of several would fight for them
        "RAY_TMPDIR": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning per client process
        "RAY_prestart_worker_first_driver": "0",  # Flower's actors cannot use such workers: saves 1 s
    }


CONNECTION = '[superlink.fedkit]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'  # config.toml
NODES = "num-supernodes={} client-resources-num-cpus=1"  # --federation-config

# ------------------------------------------------------------------------------------------------------


class SuperLink:
    """A SuperLink in simulation mode that lives as long as the `with` block.

    Its output, and that of all it starts, goes to the file `log`; all it starts has `settings` in its environment.
    Entering raises LaunchError if it does not answer in time.
    """

    def __init__(self, log: Path, settings: Mapping[str, str] | None = None) -> None:
        self.log, self.settings = log, dict(settings or {})

    def __enter__(self) -> SuperLink:
        # Not in TMPDIR, which may be long: Ray puts Unix sockets there, whose paths end at 103 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="fedkit-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
        self.environment, self.port = flower_environment(self.home) | self.settings, free_port()
        (self.home / "config.toml").write_text(CONNECTION.format(port=self.port))
        try:
            self.process = self._start("flower-superlink", *superlink_arguments(self.port), output=self.log)
            self._wait_until_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with deaf_to_signals():
            end_processes(f"FLWR_HOME={self.home}")
            shutil.rmtree(self.home, ignore_errors=True)

    def run(
        self, app_dir: Path, config: Mapping[str, Scalar], run_dir: Path, on_round: Callable[[Row], None]
    ) -> None:
        """Run an app, installed or not, and return once Flower calls the run completed.

        Parameters
        ----------
        app_dir, config
            A Flower App and its run config; `num-clients` is also the number of simulated nodes.
        run_dir
            Where the app writes `rounds.jsonl`; its log goes there too, to `flower.log`.
        on_round
            Called with each round as soon as it is recorded.

        Raises
        ------
        LaunchError
            If the run does not start or fails, with the end of its log, or if the SuperLink dies.
        """
        log, overrides = run_dir / "flower.log", self.home / "run-config.toml"
        overrides.write_text("".join(f"{key} = {to_toml(value)}\n" for key, value in config.items()))
        nodes = NODES.format(config["num-clients"])
        rounds = RoundsFollower(run_dir / "rounds.jsonl", on_round)
        options = ["--stream", "--run-config", str(overrides), "--federation-config", nodes]
        self._stream("run", str(app_dir), "fedkit", *options, log=log, rounds=rounds)
        started = re.search(r"started run (\d+)", log.read_text(errors="replace"))
        if started is None:
            raise LaunchError(f"Flower did not accept the app {app_dir}:\n{log_tail(log)}\nLog: {log}")
        # A stream can end before its run does, when its connection breaks: attach again.
        while not (entry := self._list(started[1]))["status"].startswith("finished"):
            self._stream("log", started[1], "fedkit", "--stream", log=log, rounds=rounds)
        if entry["status"] != "finished:completed":
            reason = f"the run ended as {entry['status']!r}: {entry['status-details']}"
            raise LaunchError(f"{reason}\n{log_tail(log)}\nLog: {log}")

    def _stream(self, *arguments: str, log: Path, rounds: RoundsFollower) -> None:
        """Run a `flwr` command that prints a run's log until the run ends; report rounds meanwhile."""
        stream = self._start("flwr", *arguments, output=log)
        try:
            while stream.poll() is None:
                self._check_alive()
                rounds.report()
                time.sleep(POLL_SECONDS)
        finally:
            stream.kill()
            stream.wait()
        rounds.report()

    def _list(self, run_id: str) -> dict[str, str]:
        """Return what `flwr ls` says about a run."""
        self._check_alive()
        command = [program("flwr"), "ls", "fedkit", "--run-id", run_id, "--format", "json"]
        try:
            answer = subprocess.run(command, env=self.environment, capture_output=True, timeout=COMMAND_SECONDS)
            entry: dict[str, str] = json.loads(answer.stdout)["runs"][0]
        except (subprocess.TimeoutExpired, ValueError, LookupError) as error:
            raise LaunchError(f"cannot ask the SuperLink about run {run_id}: {error!r}. Log: {self.log}") from None
        return entry

    def _start(self, name: str, *arguments: str, output: Path) -> subprocess.Popen[bytes]:
        command, quiet = [program(name), *arguments], subprocess.DEVNULL
        with output.open("wb") as file:  # a session of its own, since Ctrl-C is ours to answer
            return subprocess.Popen(
                command, env=self.environment, stdin=quiet, stdout=file, stderr=file, start_new_session=True
            )

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self._check_alive()
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                return
            time.sleep(POLL_SECONDS)
        raise LaunchError(f"the SuperLink did not answer within {START_SECONDS:.0f} s. Log: {self.log}")

    def _check_alive(self) -> None:
        if (code := self.process.poll()) is not None:
            raise LaunchError(f"the SuperLink ended with code {code}:\n{log_tail(self.log)}\nLog: {self.log}")


def program(name: str) -> str:
    """Return the path of a command-line program, which must be installed beside this Python."""
    path = Path(sys.executable).with_name(name)
    if not path.exists():
        raise LaunchError(f"cannot find {name!r} beside {sys.executable}. Install flwr[simulation] there.")
    return str(path)


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 on which nobody listened a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def to_toml(value: Scalar) -> str:
    """Return a run-config value in TOML, whose basic strings are JSON's."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (bool, str)) else repr(value)


def processes_with(setting: str) -> Iterator[int]:
    """Yield the processes that have `NAME=value` in their environment.

    Flower and Ray put their children into sessions of their own and lose some when they die early, so
    neither a process group nor the tree of parents has all of them. What they all inherit is this.
    """
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's process, or one that just ended
            if setting.encode() in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)
    if sys.platform == "darwin":
        listing = subprocess.run(["ps", "-A", "-E", "-ww", "-o", "pid=,command="], capture_output=True, text=True)
        yield from (int(line.split()[0]) for line in listing.stdout.splitlines() if setting in line.split())


def end_processes(setting: str) -> None:
    """End all `processes_with(setting)`: at first politely, after `STOP_SECONDS` forcibly."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in processes_with(setting):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + STOP_SECONDS
        while any(processes_with(setting)) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


@contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Ignore Ctrl-C and its like: an impatient second one must not interrupt the cleaning up."""
    # Only the main thread may set handlers, and only it is interrupted.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if is_main else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
