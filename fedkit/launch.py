"""Flower's simulation as one context manager, which brings everything it needs and leaves nothing behind.

    with SuperLink(log) as superlink:
        superlink.run(app_dir, run_config, run_dir, on_round=print)

A `SuperLink` has its own Flower home, port, in-memory state and Ray, so any number of them, and the
user's own, live side by side on one machine. It is driven through Flower's command-line programs, whose
interface changes less than Flower's modules do. POSIX only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

from fedkit.config import Scalar
from fedkit.errors import LaunchError
from fedkit.follow import RoundsFollower, log_tail
from fedkit.ledger import ROUNDS
from fedkit.processes import POLL_SECONDS, deaf_to_signals, end_processes, free_port, program
from fedkit.report import Row
from fedkit.submit import Connection

START_SECONDS = 60.0  # until the SuperLink answers; it takes 2 s on two idle cores

# --- what may differ between Flower versions; the same from 1.39 to 1.41 ------------------------------


def simulation_arguments(port: int) -> list[str]:
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
        "OMP_NUM_THREADS": "1",  # one core per client: the threads of several clients would compete for cores
        "RAY_TMPDIR": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning per client process
        "RAY_prestart_worker_first_driver": "0",  # Flower's actors cannot use such workers: saves 1 s
    }


CONNECTION = '[superlink.fedkit]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'  # config.toml
NODES = "num-supernodes={} client-resources-num-cpus=1"  # --federation-config

# ------------------------------------------------------------------------------------------------------


class SuperLink(Connection):
    """A SuperLink in simulation mode that lives as long as the `with` block.

    Its output, and that of its child processes, goes to the file `log`; they all have `settings` in their
    environment. Entering raises LaunchError if it does not answer in time.
    """

    def __init__(self, log: Path, settings: Mapping[str, str] | None = None) -> None:
        super().__init__("fedkit")
        self.log, self.settings = log, dict(settings or {})

    def __enter__(self) -> Self:
        # Not in TMPDIR, which may be long: Ray puts Unix sockets there, whose paths end at 103 bytes.
        self.home = Path(tempfile.mkdtemp(prefix="fedkit-", dir=os.environ.get("RAY_TMPDIR", "/tmp")))
        self.environment, self.port = flower_environment(self.home) | self.settings, free_port()
        (self.home / "config.toml").write_text(CONNECTION.format(port=self.port))
        try:
            with self.log.open("wb") as file:  # a session of its own, since fedkit handles Ctrl-C
                self.process = subprocess.Popen(
                    [program("flower-superlink"), *simulation_arguments(self.port)],
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    start_new_session=True,
                )
            self._wait_until_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """End all processes that were started."""
        with deaf_to_signals():
            end_processes(f"FLWR_HOME={self.home}")
            shutil.rmtree(self.home, ignore_errors=True)

    def options(self, config: Mapping[str, Scalar]) -> list[str]:
        """Return how many nodes to simulate: `num-clients`."""
        return ["--federation-config", NODES.format(config["num-clients"])]

    def follower(self, run_dir: Path, on_round: Callable[[Row], None]) -> RoundsFollower:
        """Return a follower of the rounds that the app writes into its `run-dir`, which is the same folder."""
        return RoundsFollower(run_dir / ROUNDS, on_round)

    def check_alive(self) -> None:
        """Raise LaunchError if the SuperLink has ended."""
        if (code := self.process.poll()) is not None:
            raise LaunchError(f"the SuperLink ended with code {code}:\n{log_tail(self.log)}\nLog: {self.log}")

    def say_what_goes_on(self, error: BaseException, run_id: str) -> None:
        """Add nothing: the run ends with the `with` block."""

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=1):
                return
            time.sleep(POLL_SECONDS)
        raise LaunchError(f"the SuperLink did not answer within {START_SECONDS:.0f} s. Log: {self.log}")
