"""Rounds in TensorBoard and MLflow: written by `fedkit run`, read back with the trackers' own readers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from fedkit import cli, trackers
from fedkit.errors import ConfigError, LaunchError
from fedkit.plan import Arm
from fedkit.trackers import MLFLOW_RUN, check_trackers, numbers_of, tracking
from tests.helpers.superlink import FakeSuperLink, row

TINY_APP = Path(__file__).parent / "fixtures" / "tiny_app"


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard reads: steps and values by tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    found = EventAccumulator(str(folder))
    found.Reload()
    return {
        tag: [(event.step, float(make_ndarray(event.tensor_proto))) for event in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }


def test_what_a_tracker_gets_are_the_numbers_of_a_round() -> None:
    inside = {"train": {"train-loss": 0.5, "name": "x"}, "missing-clients": ["1"], "done": True}
    assert numbers_of({**row(2), **inside}) == {
        "accuracy": 0.5,
        "seconds": 1.0,
        "uplink-bytes": 20.0,
        "downlink-bytes": 10.0,
        "fp32-bytes": 40.0,
        "train/train-loss": 0.5,
    }


def test_tensorboard_reads_every_round_of_every_arm_also_after_a_resumption(
    superlink: type[FakeSuperLink], tmp_path: Path
) -> None:
    pytest.importorskip("tensorboard")
    superlink.ends[1] = LaunchError("it broke")
    options = ["--strategy", "aquila", "--seeds", "2", "--out", "out", "--tensorboard", "board"]
    assert cli.main(["run", str(TINY_APP), *options]) == 1
    assert events(tmp_path / "board/out/aquila-seed0")["uplink-bytes"] == [(0, 0.0), (1, 10.0)]
    assert cli.main(["resume", "out"]) == 0
    for arm in ("aquila-seed0", "aquila-seed1"):
        found = events(tmp_path / "board/out" / arm)
        assert found["uplink-bytes"] == [(k, 10.0 * k) for k in range(4)]
        assert found["accuracy"] == [(k, 0.5) for k in range(4)]
        lines = (tmp_path / "out" / arm / "rounds.jsonl").read_text().splitlines()
        assert [json.loads(line)["round"] for line in lines] == [0, 1, 2, 3]


def test_mlflow_has_a_run_for_each_arm_which_a_resumption_goes_on_with(
    superlink: type[FakeSuperLink], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # where there is no server
    uri = (tmp_path / "mlflow").as_uri()
    superlink.ends[1] = LaunchError("it broke")
    assert cli.main(["run", str(TINY_APP), "--strategy", "aquila", "--out", "out", "--mlflow", uri]) == 1
    client = mlflow.MlflowClient(tracking_uri=uri)
    run_id = (tmp_path / "out/aquila-seed0" / MLFLOW_RUN).read_text()
    assert client.get_run(run_id).info.status == "FAILED"
    assert cli.main(["resume", "out"]) == 0
    experiment = client.get_experiment_by_name("tiny-app")
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status, found.info.run_name) == (run_id, "FINISHED", "out/aquila-seed0")
    assert found.data.params["strategy"] == "aquila"
    history = client.get_metric_history(run_id, "uplink-bytes")
    assert [(metric.step, metric.value) for metric in history] == [(k, 10.0 * k) for k in range(4)]


def test_without_an_option_nothing_is_tracked_and_without_the_package_nothing_is_begun(
    superlink: type[FakeSuperLink], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["run", str(TINY_APP), "--out", "plain"]) == 0
    assert json.loads((tmp_path / "plain/plan.json").read_text())["trackers"] == {}
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedkit\[mlflow\]'"):
        check_trackers({"mlflow": "x"})
    assert cli.main(["run", str(TINY_APP), "--out", "out", "--tensorboard", "board"]) == 2
    assert not (tmp_path / "out").exists()


class Frail:
    """A tracker that fails with its second round."""

    def __init__(self, target: str, arm: Arm, app: str) -> None:
        if target == "nowhere":
            raise OSError("no such place")
        self.rounds: list[int] = []

    def record(self, server_round: int, numbers: Mapping[str, float]) -> None:
        if self.rounds:
            raise OSError("the server is gone")
        self.rounds.append(server_round)

    def end(self, *, completed: bool) -> None:
        raise AssertionError("it was given up")


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "TRACKERS", {"frail": Frail})
    arm = Arm({"run-dir": "x"}, tmp_path / "arm")
    with tracking(arm, "app", {"frail": "here"}) as track:
        for number in range(3):
            track(row(number))
    assert caplog.text.count("frail is given up, the run goes on: the server is gone") == 1
    with (
        pytest.raises(LaunchError, match=r"--frail: cannot write to nowhere"),
        tracking(arm, "", {"frail": "nowhere"}),
    ):
        pytest.fail("begun")
