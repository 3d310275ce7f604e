"""The machine, its time and its memory."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PACKAGES = ("fedkit", "flwr", "numpy", "torch")


@cache
def machine() -> dict[str, Any]:
    """Return the processor's name, the number of cores this process may use, and versions."""
    installed = {dist.metadata["Name"]: dist.version for dist in metadata.distributions()}
    versions = {name: installed[name] for name in PACKAGES if name in installed}
    return {"cpu": _cpu(), "cores": _cores(), "python": platform.python_version(), **versions}


@cache
def commit() -> str:
    """Return the short hash of the commit, with a plus sign if tracked files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def side_by_side(arms: Mapping[str, Callable[[], object]], *, repeats: int) -> dict[str, float]:
    """Return the median seconds of each arm; all run once per repeat, so that a busy moment hits them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, run in arms.items():
            gc.collect()
            start = time.perf_counter()
            result = run()
            seconds[name].append(time.perf_counter() - start)
            del result
    return {name: statistics.median(times) for name, times in seconds.items()}


def peak_rise(run: Callable[[], object]) -> int:
    """Return by how many bytes the resident memory of a forked process rises, at most, while `run` runs.

    Linux's own high-water mark is read where there is one; elsewhere what `getrusage` says.
    """
    context = get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_measure, args=(run, sender))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError:
        raise RuntimeError("the process whose memory was measured ended early.") from None
    finally:
        process.join()


def _measure(run: Callable[[], object], sender: Connection) -> None:
    gc.collect()
    _trim()
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # forgets the high-water mark
        before = status_bytes("VmRSS")
        result = run()
        sender.send(max(status_bytes("VmHWM") - before, 0))
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result = run()
        unit = 1 if platform.system() == "Darwin" else 1024
        sender.send(unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
    del result


def _trim() -> None:
    """Give freed memory back, which what is measured would otherwise take first, unseen."""
    with suppress(OSError, AttributeError):  # another C library than glibc
        ctypes.CDLL(None).malloc_trim(0)


def status_bytes(key: str, pid: int | str = "self") -> int:
    """Return what Linux says of a process's memory: `VmRSS`, resident now; `VmHWM`, at most; 0 if it has ended.

    Unlike what `getrusage` calls the peak, it leaves out what the process that started this one held.
    """
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith(key + ":")), 0)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line for line in info.read_text().splitlines() if line.startswith("model name")] if info.exists() else []
    )
    return names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
