"""Fixtures shared by all tests."""

import logging

import pytest

from fedkit.flower import task_identity

collect_ignore = ["fixtures"]  # apps, and parts of such: Flower imports them

logging.getLogger("flwr").setLevel(logging.WARNING)  # a hundred lines per round slow hypothesis down


@pytest.fixture(autouse=True)
def _flower_task():
    """Flower's messages need the identity of a task; outside a run the tests provide it."""
    with task_identity(run_id=1, node_id=1):
        yield
