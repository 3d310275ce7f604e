"""Fixtures shared by all tests."""

import logging
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # as many of them as cores: threads of each would fight for those
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import pytest

from fedkit import cli
from fedkit.flower import task_identity
from tests.helpers.superlink import FakeSuperLink

collect_ignore = ["fixtures"]  # apps, and parts of such: Flower imports them

logging.getLogger("flwr").setLevel(logging.WARNING)  # a hundred lines per round slow hypothesis down


@pytest.fixture(autouse=True)
def _flower_task():
    """Flower's messages need the identity of a task; outside a run the tests provide it."""
    with task_identity(run_id=1, node_id=1):
        yield


@pytest.fixture
def superlink(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakeSuperLink]:
    """The command `fedkit`, in an empty folder, starts this in place of Flower."""

    class Mine(FakeSuperLink):
        pass

    monkeypatch.setattr(cli, "SuperLink", Mine)
    monkeypatch.chdir(tmp_path)
    return Mine
