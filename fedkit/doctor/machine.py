"""Processors, memory, disk and GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedkit.clients.resident import total_bytes
from fedkit.config import RUNS_DIR
from fedkit.report.figures import format_bytes
from fedkit.state import STATE_DIR

from .finding import Finding, ok, problem, warning
from .packages import torch_build

MEMORY: Final = 2e9  # bytes; a simulation's server and one client at a time, with torch
DISK_LEAST, DISK_WANTED = 1e8, 2e9  # bytes
SMI: Final = ("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")


def machine_findings() -> Iterator[Finding]:
    """Yield the findings about this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield ok("processors", f"{cores}: as many clients of a simulation train at once")
    memory = total_bytes()
    if memory >= MEMORY:
        yield ok("memory", format_bytes(memory))
    else:
        advice = f"A simulation with torch takes about {format_bytes(MEMORY)}. Nodes can be smaller: see profiles."
        yield warning("memory", format_bytes(memory), advice)
    yield _gpu()
    places = {
        "disk for runs": os.environ.get(RUNS_DIR, "."),
        "temporary files": os.environ.get("RAY_TMPDIR", "/tmp"),
    }
    if state := os.environ.get(STATE_DIR):
        places["disk for clients' memories"] = state
    for what, folder in places.items():
        yield _disk(what, Path(folder))


def _gpu() -> Finding:
    try:
        said = subprocess.run(SMI, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ok("GPU", "none; clients train on processors")
    found = "; ".join(said.splitlines())
    if torch_build() == "CPUs":
        return warning("GPU", f"{found}, but torch is built for CPUs", "Install a torch that is built for CUDA.")
    return ok("GPU", found)


def _disk(what: str, folder: Path) -> Finding:
    """Return the finding about a folder, or about its nearest parent that exists."""
    there = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    if not os.access(there, os.W_OK):
        return problem(what, f"{there} cannot be written", "Choose another folder, or get leave to write.")
    free = shutil.disk_usage(there).free
    found = f"{format_bytes(free)} free in {there}"
    if free < DISK_LEAST:
        return problem(what, found, "Free the disk: runs keep checkpoints and logs.")
    if free < DISK_WANTED:
        return warning(what, found, f"Runs with larger models want {format_bytes(DISK_WANTED)}.")
    return ok(what, found)
