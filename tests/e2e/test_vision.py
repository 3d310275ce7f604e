"""The vision example through Flower's simulation, with torchvision: `.ci/run` has an environment for it."""

import json
from pathlib import Path

import pytest

from fedkit import cli

APP = str(Path(__file__).parents[2] / "examples" / "vision")
pytestmark = [pytest.mark.vision, pytest.mark.deployment, pytest.mark.slow]


def test_a_few_rounds_on_augmented_digits_learn_for_a_tenth_of_the_bytes(tmp_path):
    pytest.importorskip("torchvision", reason='needs torchvision: see the stage "vision" of .ci/run')
    assert cli.main(["run", APP, "--out", str(tmp_path / "out"), "--rounds", "3"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "out/aquila-seed0/rounds.jsonl").read_text().splitlines()]
    assert rows[-1]["accuracy"] > rows[0]["accuracy"] + 0.2
    (found,) = json.loads((tmp_path / "out/summary.json").read_text())["strategies"].values()
    assert found["times-less-uplink-than-fp32"] >= 10
