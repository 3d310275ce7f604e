"""Starting and ending programs, with programs that are not Flower."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedkit import launch
from fedkit.errors import LaunchError
from fedkit.launch import SuperLink

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


@pytest.fixture
def mark() -> Iterator[str]:
    """Return a setting that no other process has."""
    setting = f"FEDKIT_TEST={uuid.uuid4()}"
    yield setting
    launch.end_processes(setting)


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
        assert list(launch.processes_with(mark)) == [child.pid]
    finally:
        other.kill()


def test_ending_is_polite_first(mark: str) -> None:
    child = start(mark)
    launch.end_processes(mark)
    assert child.wait(1) == -signal.SIGTERM


def test_what_ignores_politeness_is_killed_in_bounded_time(mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "STOP_SECONDS", 0.3)
    child, began = start(mark, STUBBORN), time.monotonic()
    launch.end_processes(mark)
    assert child.wait(1) == -signal.SIGKILL
    assert time.monotonic() - began < 2


def test_an_impatient_ctrl_c_does_not_interrupt_the_cleaning_up() -> None:
    before = signal.getsignal(signal.SIGINT)  # ignored already where a shell started this in the background
    with launch.deaf_to_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("value", [True, False, 0, -7, 1e-9, 0.5, "", 'a "b" = c\\', "line\nbreak", "größe"])
def test_values_survive_toml(value: bool | int | float | str) -> None:
    back = tomllib.loads(f"key = {launch.to_toml(value)}")["key"]
    assert back == value
    assert type(back) is type(value)


def test_flower_processes_do_not_join_a_ray_that_runs_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    environment = launch.flower_environment(Path("/home-of-flower"))
    assert "RAY_ADDRESS" not in environment
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_two_ports_differ() -> None:
    assert launch.free_port() != launch.free_port()


def test_a_program_that_is_not_installed_is_named() -> None:
    with pytest.raises(LaunchError, match="flower-superstar"):
        launch.program("flower-superstar")


def test_a_superlink_that_dies_at_once_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "superlink_arguments", lambda port: ["--no-such-option"])
    superlink = SuperLink(tmp_path / "superlink.log")
    with pytest.raises(LaunchError, match=r"ended with code 2(.|\n)*--no-such-option"), superlink:
        pytest.fail("entered")
    assert not superlink.home.exists()
    assert not list(launch.processes_with(f"FLWR_HOME={superlink.home}"))


def test_a_superlink_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "START_SECONDS", 0.5)
    monkeypatch.setattr(launch, "program", lambda name: sys.executable)
    monkeypatch.setattr(launch, "superlink_arguments", lambda port: ["-c", "import time; time.sleep(60)"])
    superlink = SuperLink(tmp_path / "superlink.log")
    with pytest.raises(LaunchError, match="did not answer"), superlink:
        pytest.fail("entered")
    assert not list(launch.processes_with(f"FLWR_HOME={superlink.home}"))
