"""What the README says of the quickstart, measured again: minutes, for real, through Flower's simulation."""

import json
from pathlib import Path

import pytest

from fedkit import cli

APP = str(Path(__file__).parents[2] / "examples" / "quickstart")
pytestmark = [pytest.mark.slow, pytest.mark.deployment]


def summary(tmp_path, *options):
    assert cli.main(["run", APP, "--out", str(tmp_path / "out"), *options]) == 0
    return json.loads((tmp_path / "out" / "summary.json").read_text())["strategies"]


def test_aquila_is_within_a_point_of_fedavg_for_a_tenth_of_the_bytes(tmp_path):
    found = summary(tmp_path, "--strategy", "aquila", "--compare", "fedavg", "--seeds", "3")
    assert found["aquila"]["accuracy-mean"] >= found["fedavg"]["accuracy-mean"] - 0.01
    assert found["aquila"]["times-less-uplink-than-fp32"] >= 10
    assert found["aquila"]["times-less-uplink-than-fedavg"] >= 10


def test_training_converges_with_a_third_of_the_replies_lost(tmp_path):
    assert summary(tmp_path, "--drop", "0.3")["aquila"]["accuracy-mean"] >= 0.88
    rows = [json.loads(line) for line in (tmp_path / "out/aquila-seed0/rounds.jsonl").read_text().splitlines()]
    assert 0.2 < sum(row["missing"] for row in rows) / sum(row["asked"] for row in rows) < 0.4


def test_the_adapter_loads_with_plain_peft(tmp_path):
    from peft import PeftConfig
    from safetensors.numpy import load_file

    summary(tmp_path, "--rounds", "1")
    adapter = tmp_path / "out/aquila-seed0/adapter"
    assert PeftConfig.from_pretrained(str(adapter)).r == 8
    assert any(
        array.any() for name, array in load_file(adapter / "adapter_model.safetensors").items() if "lora_B" in name
    )
