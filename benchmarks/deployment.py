"""A SuperLink and SuperNodes as processes on this machine, for the duration of a `with` block.

They are named ``superlink``, ``supernode-0`` and so on; any of them can be killed and restarted::

    with Deployment(folder, nodes=4, secure=True, database=True) as deployment:
        run = deployment.submit(app, config)
        deployment.kill("supernode-1", "flwr-clientapp")
        deployment.kill("supernode-2")
        deployment.connect_node(2)  # tries again while Flower refuses it
        deployment.kill("superlink")
        deployment.start_superlink()
        run.wait()

The Fleet API is gRPC with Flower 1.39, HTTP from 1.40 on.
"""

from __future__ import annotations

import json
import random
import socket
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from benchmarks.certificates import certificates, node_key
from benchmarks.processes import SECONDS, Processes, wait_until
from fedkit.config import Scalar
from fedkit.flower import FLEET_IS_GRPC, Tls, superlink_arguments
from fedkit.processes import free_port, program
from fedkit.submit import write_run_config

NAME = "here"  # of the SuperLink, for the program `flwr`
SUPERLINK = "superlink"
CONNECTED = "SuperNode ID: "  # a node logs it each time


class Deployment(Processes):
    """Its own ports and Flower homes; nothing is left behind but logs.

    Parameters
    ----------
    folder : Path
        For logs and Flower's files; it must not exist.
    nodes : int
        How many SuperNodes, with ``partition-id`` from 0.
    secure : bool
        TLS, and nodes that are known by their keys.
    database : bool
        Whether the SuperLink keeps its state in a file, so that it outlives a restart.
    settings : mapping, optional
        Further environment of all processes.
    host : str
        Where the SuperLink listens.
    namespaces : mapping, optional
        The network namespaces of nodes that have one of their own, by name.
    """

    def __init__(
        self,
        folder: Path,
        nodes: int = 2,
        *,
        secure: bool = False,
        database: bool = False,
        settings: Mapping[str, str] | None = None,
        host: str = "127.0.0.1",
        namespaces: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(folder, settings, namespaces)
        self.nodes, self.secure, self.host = nodes, secure, host
        self.database = folder / "state.db" if database else None
        self.port = _quiet_port()
        self.fleet_port = _quiet_port() if FLEET_IS_GRPC else self.port
        self.environment = self.environment_of("flwr")  # for the program `flwr`
        self.tls: Tls | None = None
        self.keys: list[Path] = []  # of the nodes, if secure

    def __enter__(self) -> Deployment:
        self.folder.mkdir(parents=True)
        if self.secure:
            self.tls = certificates(self.folder)
            self.keys = [node_key(self.folder / node_name(i)) for i in range(self.nodes)]
        self._configure()
        try:
            self.start_superlink()
            for i, key in enumerate(self.keys):
                self.register(key, node_name(i))
            for i in range(self.nodes):
                self.start_node(i)
            for i in range(self.nodes):
                self.wait_for(CONNECTED, 1, node_name(i))
        except BaseException:
            self.end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self.end()

    # ---- SuperLink and SuperNodes --------------------------------------------------------------

    def start_superlink(self) -> None:
        """Start the SuperLink, for the first time or again, and return once it listens."""
        arguments = superlink_arguments(
            self.port, self.fleet_port, host=self.host, tls=self.tls, database=self.database
        )
        process = self.start("flower-superlink", SUPERLINK, *arguments)

        def listens() -> bool:
            if process.poll() is not None:
                raise ChildProcessError(f"the SuperLink ended with code {process.returncode}. Logs: {self.folder}")
            with suppress(OSError), socket.create_connection((self.host, self.port), timeout=1):
                return True
            return False

        wait_until(listens, f"the SuperLink did not listen. Logs: {self.folder}")

    def start_node(self, i: int, **settings: str) -> subprocess.Popen[bytes]:
        """Start a SuperNode, for the first time or again, with some more environment."""
        arguments = [*self.node_arguments(self.keys[i] if self.secure else None), "--node-config"]
        return self.start("flower-supernode", node_name(i), *arguments, f"partition-id={i}", **settings)

    def connect_node(self, i: int, **settings: str) -> None:
        """Start a SuperNode again and again until the SuperLink takes it.

        One that was killed is refused until its old session has lapsed, which takes up to a minute.
        """
        name = node_name(i)
        times, attempt = self.count(CONNECTED, name) + 1, self.start_node(i, **settings)

        def connected() -> bool:
            nonlocal attempt
            if attempt.poll() is not None:
                attempt = self.start_node(i, **settings)
            return self.count(CONNECTED, name) >= times

        wait_until(connected, f"{name} was not taken. Logs: {self.folder}", pause=2.0)

    def node_arguments(self, key: Path | None = None) -> list[str]:
        """Return the arguments of a SuperNode that finds the SuperLink; with TLS, and a key to be known by."""
        arguments = ["--superlink", f"{self.host}:{self.fleet_port}", "--port", str(free_port())]
        if self.tls is None:
            return ["--insecure", *arguments]
        arguments += ["--root-certificates", str(self.tls.ca)]
        return arguments if key is None else [*arguments, "--auth-supernode-private-key", str(key)]

    def register(self, key: Path, name: str) -> None:
        """Let the SuperLink know the public key of a node."""
        self.flwr("supernode", "register", str(key.with_suffix(".pub")), NAME, "--name", name)

    # ---- runs ----------------------------------------------------------------------------------

    def submit(self, app: Path, config: Mapping[str, Scalar]) -> subprocess.Popen[bytes]:
        """Start a run of an app and return the process that prints its log to ``run.log``, until it ends."""
        overrides = self.folder / "run-config.toml"
        write_run_config(overrides, config)
        command = [program("flwr"), "run", str(app), NAME, "--stream", "--run-config", str(overrides)]
        with self.log_of("run").open("wb") as file:
            return subprocess.Popen(command, env=self.environment, stdout=file, stderr=file)

    def run(self, app: Path, config: Mapping[str, Scalar], seconds: float = SECONDS) -> None:
        """Run an app and return once it is completed, which may take so many seconds."""
        with self.submit(app, config) as process:
            try:
                process.wait(seconds)
            finally:
                process.kill()
        newest = max(self.runs(), key=lambda run: run["pending-at"], default=None)
        if newest is None or newest["status"] != "finished:completed":
            raise RuntimeError(f"the run was not completed: {newest}. Log: {self.log_of('run')}")

    def runs(self) -> list[dict[str, str]]:
        """Return what `flwr ls` says about each run."""
        runs: list[dict[str, str]] = json.loads(self.flwr("ls", NAME, "--format", "json"))["runs"]
        return runs

    def flwr(self, *arguments: str) -> str:
        """Return what the program `flwr` prints, once it is done; raise CalledProcessError if it fails."""
        command, environment = [program("flwr"), *arguments], self.environment
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=SECONDS)
        try:
            done.check_returncode()
        except subprocess.CalledProcessError as error:
            error.add_note(done.stdout + done.stderr)
            raise
        return done.stdout

    def _configure(self) -> None:
        """Tell the program `flwr` where the SuperLink is."""
        self.home("flwr").mkdir(parents=True)
        trust = "insecure = true" if self.tls is None else f'root-certificates = "{self.tls.ca}"'
        text = f'[superlink.{NAME}]\naddress = "{self.host}:{self.port}"\n{trust}\n'
        (self.home("flwr") / "config.toml").write_text(text)


def node_name(i: int) -> str:
    """Return the name of a node."""
    return f"supernode-{i}"


def _quiet_port() -> int:
    """Return a free port that no outgoing connection is given, either, while its owner is being restarted."""
    for port in random.sample(range(20_000, 32_000), 100):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("found no free port between 20000 and 32000.")
