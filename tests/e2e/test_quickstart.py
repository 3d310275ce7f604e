"""What the README says of the quickstart, measured again: minutes, for real, through Flower's simulation."""

import json
import os
from pathlib import Path

import pytest

from fedkit import cli

APP = str(Path(__file__).parents[2] / "examples" / "quickstart")
SEEDS = os.environ.get("FEDKIT_SEEDS", "1")  # `.ci/run --full` takes the README's 3
NOISE = 0.0 if SEEDS == "3" else 0.015  # of the difference of two runs with one seed
pytestmark = [pytest.mark.slow, pytest.mark.deployment]


def run(out, *options):
    assert cli.main(["run", APP, "--out", str(out), *options]) == 0
    return json.loads((out / "summary.json").read_text())["strategies"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs") / "out"


@pytest.fixture(scope="module")
def perfect_link(folder):
    return run(folder, "--compare", "fedavg", "--seeds", SEEDS)


def test_aquila_is_near_fedavg_for_a_tenth_of_the_bytes(perfect_link):
    aquila, fedavg = perfect_link["aquila"], perfect_link["fedavg"]
    assert aquila["accuracy-mean"] >= fedavg["accuracy-mean"] - 0.015 - NOISE
    assert aquila["times-less-uplink-than-fp32"] >= 10
    assert aquila["times-less-uplink-than-fedavg"] >= 10


def test_safari_with_two_fifths_of_the_replies_lost_is_near_fedavg_on_a_perfect_link(perfect_link, tmp_path):
    safari = run(tmp_path / "out", "--strategy", "safari", "--seeds", SEEDS, "--drop", "0.4")["safari"]
    assert safari["accuracy-mean"] >= perfect_link["fedavg"]["accuracy-mean"] - 0.025 - NOISE
    assert safari["times-less-uplink-than-fp32"] >= 4


@pytest.mark.full
def test_surrogates_beat_dropping_where_half_of_the_classes_is_mostly_missing(tmp_path):
    biased = ["--seeds", "3", "--run-config", "partition='halves'", "drop-half=0.8"]
    found = run(tmp_path / "out", "--strategy", "safari", "--compare", "safari-drop", *biased)
    assert found["safari"]["accuracy-mean"] > found["safari-drop"]["accuracy-mean"]


def test_training_converges_with_a_third_of_the_replies_lost(tmp_path):
    assert run(tmp_path / "out", "--drop", "0.3", "--rounds", "15")["aquila"]["accuracy-mean"] >= 0.9
    rows = [json.loads(line) for line in (tmp_path / "out/aquila-seed0/rounds.jsonl").read_text().splitlines()]
    assert 0.2 < sum(row["missing"] for row in rows) / sum(row["asked"] for row in rows) < 0.4


@pytest.mark.full
def test_the_published_form_of_aquila_does_not_converge_here(perfect_link, tmp_path):
    found = run(tmp_path / "out", "--strategy", "aquila-published")["aquila-published"]
    assert found["accuracy-mean"] < perfect_link["aquila"]["accuracy-mean"] - 0.1


def test_the_adapter_loads_with_plain_peft(perfect_link, folder):
    from peft import PeftConfig
    from safetensors.numpy import load_file

    adapter = folder / "aquila-seed0/adapter"
    assert PeftConfig.from_pretrained(str(adapter)).r == 8
    factors = load_file(adapter / "adapter_model.safetensors")
    assert any(array.any() for name, array in factors.items() if "lora_B" in name)
