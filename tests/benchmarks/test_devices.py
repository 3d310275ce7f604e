"""Unlike devices train one model, each at its rank; and a node's memory is its own, not that of who started it."""

import json
import os

import pytest

from benchmarks import devices, mobile


def test_an_arm_is_shown_at_its_best_rate():
    rows = [
        {"rate": rate, "accuracy": [0.1, *[final] * 3], "loss": [9.0, *[1 - final] * 3]}
        for rate, final in ((1, 0.6), (1, 0.8), (2, 0.75), (2, 0.75))
    ]
    line = devices.compare("arm", rows)
    assert (line["rate"], line["shown"], line["loss"]) == (2, "0.750/0.750", 0.25)


@pytest.mark.slow
def test_the_benchmark_of_devices_from_end_to_end(tmp_path):
    pytest.importorskip("torchao", reason="the extra `mobile` is not installed")
    devices.main(["--out", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [row["arm"] for row in rows] == list(devices.ARMS)
    assert all(len(row["accuracy"]) == 1 and row["accuracy"][0] > 0.2 for row in rows)


@pytest.mark.slow
@pytest.mark.skipif("FEDKIT_DATA_DIR" not in os.environ, reason="FEDKIT_DATA_DIR is not set")
def test_a_mobile_node_stays_within_its_budget(tmp_path):
    pytest.importorskip("torchao", reason="the extra `mobile` is not installed")
    mobile.main(["--out", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["error"] is None
    assert row["imports"] < row["peak"] < 650  # without `datasets`


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.skipif("FEDKIT_DATA_DIR" not in os.environ, reason="FEDKIT_DATA_DIR is not set")
@pytest.mark.parametrize("profile", ["cpu", "mobile"])
def test_a_federation_of_a_profile_trains(profile):
    pytest.importorskip("torchao", reason="the extra `mobile` is not installed")
    assert mobile.measure_run(profile, seed=0, rounds=3, steps=8)["accuracy"] > 0.55  # half of them are positive
