"""Programs that fedkit starts: where to find them, their ports, and how to end them. POSIX only."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fedkit.errors import LaunchError

STOP_SECONDS = 3.0  # for ending politely, and three times that for ending forcibly
POLL_SECONDS = 0.1


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


def processes_with(setting: str) -> Iterator[int]:
    """Yield the processes that have `NAME=value` in their environment.

    Flower and Ray put their children into sessions of their own and lose some when they die early, so
    neither a process group nor the process tree has all of them. They all inherit this setting.
    """
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's process, or one that just ended
            if setting.encode() in path.read_bytes().split(b"\0"):
                yield int(path.parent.name)
    if sys.platform == "darwin":
        listing = subprocess.run(["ps", "-A", "-E", "-ww", "-o", "pid=,command="], capture_output=True, text=True)
        yield from (int(line.split()[0]) for line in listing.stdout.splitlines() if setting in line.split())


def end_processes(setting: str) -> None:
    """End all `processes_with(setting)`: at first politely, after `STOP_SECONDS` forcibly.

    A process that is just being started is not seen, so two searches in a row must find none.
    """
    begin, asked, clear = time.monotonic(), set[int](), 0
    while clear < 2 and (elapsed := time.monotonic() - begin) < 4 * STOP_SECONDS:
        forcibly, pids = elapsed >= STOP_SECONDS, set(processes_with(setting))
        for pid in pids if forcibly else pids - asked:  # politely once
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if forcibly else signal.SIGTERM)
        asked, clear = asked | pids, 0 if pids else clear + 1
        time.sleep(POLL_SECONDS)


@contextmanager
def deaf_to_signals() -> Iterator[None]:
    """Ignore Ctrl-C and similar signals: an impatient second one must not interrupt the cleanup."""
    # Only the main thread may set handlers, and only it is interrupted.
    is_main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if is_main else ()
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
