"""Flower's processes on this machine, by name: started, watched, killed, restarted."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from fedkit.launch import flower_environment
from fedkit.processes import end_processes, processes_with, program

SECONDS = 240.0  # for anything to happen
_MARK = "FEDKIT_DEPLOYMENT"  # in the environment of all processes: the folder


class Processes:
    """Each name stands for a machine: a Flower home, a log, the process started there, and its children.

    Parameters
    ----------
    folder : Path
        For logs and Flower's homes.
    settings : mapping, optional
        Further environment of all processes.
    namespaces : mapping, optional
        The network namespaces of machines that have one of their own, by name.
    """

    def __init__(
        self,
        folder: Path,
        settings: Mapping[str, str] | None = None,
        namespaces: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.namespaces = folder, dict(namespaces or {})
        self.settings = {"FLWR_LOG_LEVEL": "DEBUG", **(settings or {})}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, command: str, name: str, *arguments: str, **settings: str) -> subprocess.Popen[bytes]:
        """Start a program of Flower, with some more environment; its output is added to the machine's log."""
        within = ["ip", "netns", "exec", self.namespaces[name]] if name in self.namespaces else []
        with self.log_of(name).open("ab") as file:
            self.processes[name] = subprocess.Popen(
                [*within, program(command), *arguments],
                env=self.environment_of(name) | settings,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        return self.processes[name]

    def pids(self, name: str, command: str) -> list[int]:
        """Return the processes on a machine that run a program, such as ``flwr-clientapp`` on a node."""
        found = []
        for pid in processes_with(f"FLWR_HOME={self.home(name)}"):
            with suppress(OSError):  # it has just ended
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[:2]
                if command in [Path(os.fsdecode(word)).name for word in words]:
                    found.append(pid)
        return found

    def kill(self, name: str, command: str | None = None) -> int:
        """Kill what was started on a machine, or what runs `command` there, with SIGKILL; return how many."""
        pids = [self.processes[name].pid] if command is None else self.pids(name, command)
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if command is None:
            self.processes[name].wait()
        return len(pids)

    def cut_power(self, name: str) -> None:
        """Kill all that runs on a machine, with SIGKILL."""
        self.kill(name)
        while pids := list(processes_with(f"FLWR_HOME={self.home(name)}")):
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def end(self) -> None:
        """End all processes, and all that they started."""
        end_processes(f"{_MARK}={self.folder}")
        for process in self.processes.values():
            process.wait()

    def home(self, name: str) -> Path:
        """Return a machine's Flower home."""
        return self.folder / "homes" / name

    def environment_of(self, name: str) -> dict[str, str]:
        """Return the environment of a machine's processes."""
        return flower_environment(self.home(name)) | self.settings | {_MARK: str(self.folder)}

    def log_of(self, name: str) -> Path:
        """Return a machine's log."""
        return self.folder / f"{name}.log"

    def text(self, name: str) -> str:
        """Return what a machine has logged, without colours."""
        log = self.log_of(name)
        return re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace") if log.exists() else "")

    def count(self, text: str, name: str) -> int:
        """Return how often a machine has logged a text."""
        return self.text(name).count(text)

    def wait_for(self, text: str, times: int, name: str) -> None:
        """Wait until a machine has logged a text so often."""
        problem = f"{name} did not log {text!r} {times} times. Logs: {self.folder}"
        wait_until(lambda: self.count(text, name) >= times, problem)


def wait_until(done: Callable[[], bool], problem: str, pause: float = 0.2) -> None:
    """Wait until `done()`; raise TimeoutError with the problem if that takes more than `SECONDS`."""
    deadline = time.monotonic() + SECONDS
    while not done():
        if time.monotonic() > deadline:
            raise TimeoutError(problem)
        time.sleep(pause)
