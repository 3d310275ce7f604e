"""Programs are found and ended, with programs that are not Flower."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator

import pytest

from fedkit import processes
from fedkit.errors import LaunchError

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


@pytest.fixture
def mark() -> Iterator[str]:
    """Return a setting that no other process has."""
    setting = f"FEDKIT_TEST={uuid.uuid4()}"
    yield setting
    processes.end_processes(setting)


def start(mark: str, code: str = "print(flush=True); import time; time.sleep(60)") -> subprocess.Popen[bytes]:
    """Start Python in a session of its own and wait until it runs."""
    environment = os.environ | dict([mark.split("=")])
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_processes_are_found_by_their_environment_alone(mark: str) -> None:
    child, other = start(mark), start(f"{mark}-not")
    try:
        assert list(processes.processes_with(mark)) == [child.pid]
    finally:
        other.kill()


def test_ending_is_polite_first(mark: str) -> None:
    child = start(mark)
    processes.end_processes(mark)
    assert child.wait(1) == -signal.SIGTERM


def test_what_ignores_politeness_is_killed_in_bounded_time(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "STOP_SECONDS", 0.3)
    child, began = start(mark, STUBBORN), time.monotonic()
    processes.end_processes(mark)
    assert child.wait(1) == -signal.SIGKILL
    assert time.monotonic() - began < 2


def test_one_that_is_just_being_started_is_ended_too(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    child = start(mark)
    looks = iter([[], [child.pid], [], []])
    monkeypatch.setattr(processes, "processes_with", lambda setting: next(looks))
    processes.end_processes(mark)
    assert child.wait(1) == -signal.SIGTERM


def test_an_impatient_ctrl_c_does_not_interrupt_the_cleaning_up() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored already where a shell started this in the background
    with processes.deaf_to_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_two_ports_differ() -> None:
    assert processes.free_port() != processes.free_port()


def test_a_program_that_is_not_installed_is_named() -> None:
    with pytest.raises(LaunchError, match="flower-superstar"):
        processes.program("flower-superstar")
