"""A SuperLink and SuperNodes as processes of this machine, over gRPC, for as long as a `with` block."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path

from fedkit.config import Scalar
from fedkit.launch import end_processes, flower_environment, free_port, program, to_toml

SECONDS = 240.0  # for anything to happen


class Deployment:
    """Its own ports and Flower home; nothing is left behind.

    Parameters
    ----------
    folder : Path
        For logs and Flower's files.
    nodes : int
        How many SuperNodes, with ``partition-id`` from 0.
    """

    def __init__(self, folder: Path, nodes: int = 2) -> None:
        self.folder, self.nodes = folder, nodes
        self.environment = flower_environment(folder / "home") | {"FLWR_LOG_LEVEL": "DEBUG"}
        self.port, self.fleet_port = free_port(), free_port()
        self.log = folder / "superlink.log"

    def __enter__(self) -> Deployment:
        (self.folder / "home").mkdir(parents=True)
        connection = f'[superlink.here]\naddress = "127.0.0.1:{self.port}"\ninsecure = true\n'
        (self.folder / "home" / "config.toml").write_text(connection)
        fleet = f"127.0.0.1:{self.fleet_port}"
        try:
            api = ["--fleet-api-type", "grpc-rere", "--fleet-api-address", fleet, "--port", str(self.port)]
            self._start("flower-superlink", "superlink", "--insecure", *api)
            for i in range(self.nodes):
                options = ["--superlink", fleet, "--port", str(free_port()), "--node-config", f"partition-id={i}"]
                self._start("flower-supernode", f"supernode-{i}", "--insecure", *options)
            self.wait_for("[Fleet.ActivateNode] Activated", self.nodes)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        end_processes(f"FLWR_HOME={self.folder / 'home'}")

    def run(self, app: Path, config: Mapping[str, Scalar]) -> None:
        """Run an app and return once it is done."""
        overrides = self.folder / "run-config.toml"
        overrides.write_text("".join(f"{key} = {to_toml(value)}\n" for key, value in config.items()))
        command = [program("flwr"), "run", str(app), "here", "--stream", "--run-config", str(overrides)]
        with (self.folder / "run.log").open("wb") as file:
            subprocess.run(command, env=self.environment, stdout=file, stderr=file, timeout=SECONDS, check=True)

    def count(self, text: str) -> int:
        """Return how often the SuperLink has logged a text."""
        return self.log.read_text(errors="replace").count(text)

    def wait_for(self, text: str, times: int) -> None:
        """Wait until the SuperLink has logged a text so often."""
        deadline = time.monotonic() + SECONDS
        while self.count(text) < times:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{text!r} was not logged {times} times. Logs: {self.folder}")
            time.sleep(0.2)

    def _start(self, name: str, log: str, *arguments: str) -> None:
        with (self.folder / f"{log}.log").open("wb") as file:
            subprocess.Popen(
                [program(name), *arguments],
                env=self.environment,
                cwd=os.fspath(self.folder),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
