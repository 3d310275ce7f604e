"""A run that loses a process ends with a model, by itself or after `fedkit resume`, and says what happened."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import crashes

SAYS = {  # what a user finds in the output and the log
    "SuperNode": ("goes on without node", "Node Unavailable", "is client"),
    "ClientApp": ("goes on without node", "no answer in time"),
    "ServerApp": ("the run ended as 'finished:failed'",),
    "SuperLink": ("the run ended as 'finished:failed'",),
}
pytestmark = [pytest.mark.deployment, pytest.mark.slow]


def check(found: crashes.Trial) -> None:
    assert [row["round"] for row in found.rounds] == list(range(crashes.ROUNDS + 1)), (
        "no round is lost or told twice"
    )
    assert found.rounds[-1]["accuracy"] > 2 * found.rounds[1]["accuracy"], "and it learned"
    with np.load(found.model) as model:
        assert np.isfinite(model["vector"]).all()
    assert (found.resumed > 0) == (found.victim in ("ServerApp", "SuperLink"))
    if found.resumed or any(row["missing"] or row["rejected"] for row in found.rounds):
        # A ClientApp that is killed before it has begun is started again, and costs nothing.
        assert any(text in found.said for text in SAYS[found.victim]), found.said[-3000:]


@pytest.mark.parametrize("seed", [1, 3])
def test_a_run_that_loses_a_process_ends_with_a_model(tmp_path: Path, seed: int) -> None:
    check(crashes.trial(tmp_path / "trial", seed))


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 2, *range(4, 20)])
def test_twenty_runs_that_lose_a_process_end_with_a_model(tmp_path: Path, seed: int) -> None:
    check(crashes.trial(tmp_path / "trial", seed))
