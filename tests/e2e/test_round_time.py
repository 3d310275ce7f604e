"""The benchmark of round times runs; how long rounds take on a busy machine says nothing."""

import json

import pytest

from benchmarks import round_time

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


def test_the_strategies_take_turns_and_every_second_of_a_round_has_its_part(tmp_path):
    round_time.main(["--out", str(tmp_path), "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert [arm["rounds"] for arm in row["arms"]] == [row["rounds"]] * 4
    assert {arm["arm"] for arm in row["arms"]} == {
        "FedAvg",
        "FedAvg, RoundGrid",
        "Aquila",
        "ErrorFeedback",
    }
    for arm in row["arms"]:
        parts = [arm[part] for part in round_time.PARTS]
        assert min(parts) > -0.1  # a log's times are rounded
        assert sum(parts) == pytest.approx(arm["seconds"], rel=0.01)  # the medians of two rounds add up
