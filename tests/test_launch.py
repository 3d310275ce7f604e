"""Starting a SuperLink, with programs that are not Flower."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from fedkit import launch
from fedkit.errors import LaunchError
from fedkit.launch import SuperLink
from fedkit.processes import processes_with


def test_flower_processes_do_not_join_a_ray_that_runs_already(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    environment = launch.flower_environment(Path("/home-of-flower"))
    assert "RAY_ADDRESS" not in environment
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_superlink_that_dies_at_once_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "simulation_arguments", lambda port: ["--no-such-option"])
    superlink = SuperLink(tmp_path / "superlink.log")
    with pytest.raises(LaunchError, match=r"ended with code 2(.|\n)*--no-such-option"), superlink:
        pytest.fail("entered")
    assert not superlink.home.exists()
    assert not list(processes_with(f"FLWR_HOME={superlink.home}"))


def test_a_superlink_that_never_answers_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "START_SECONDS", 0.5)
    monkeypatch.setattr(launch, "program", lambda name: sys.executable)
    monkeypatch.setattr(launch, "simulation_arguments", lambda port: ["-c", "import time; time.sleep(60)"])
    superlink = SuperLink(tmp_path / "superlink.log")
    with pytest.raises(LaunchError, match="did not answer"), superlink:
        pytest.fail("entered")
    assert not list(processes_with(f"FLWR_HOME={superlink.home}"))
