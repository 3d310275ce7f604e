"""Laws of the quickstart's data and model."""

import dataclasses
import json
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors.numpy import load_file

from fedkit import assets
from fedkit.assets import asset_path
from fedkit.clients.small_vit import ASSET
from fedkit.config import parse
from fedkit.errors import FedkitError
from tests.helpers.grid import InProcessGrid

APP = Path(__file__).parents[2] / "examples" / "quickstart"


@pytest.fixture(scope="module")
def task() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(APP)
        yield __import__("quickstart.task").task
        for name in [name for name in sys.modules if name.partition(".")[0] == "quickstart"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def run_config() -> dict[str, object]:
    return tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


@pytest.fixture(scope="module")
def config(task, run_config):
    return parse(task.Config, run_config)


def test_run_config_has_exactly_the_fields_of_config(task, run_config) -> None:
    fields = {field.name.replace("_", "-") for field in dataclasses.fields(task.Config)}
    assert set(run_config) == fields


def test_split_keeps_500_or_more_test_images_that_nobody_trains_on(task) -> None:
    images, labels, test_images, test_labels = task.load_split()
    assert len(images) == len(labels)
    assert len(test_images) == len(test_labels) >= 500
    assert len(images) + len(test_images) == 1797
    assert np.bincount(test_labels).min() >= 50
    assert 0 <= images.min() <= images.max() == 1


def test_local_seed_differs_between_rounds_and_clients(task, config) -> None:
    seeds = [task.local_seed(config, server_round, node) for server_round in range(20) for node in range(10)]
    assert len(set(seeds)) == len(seeds)


def test_same_seed_builds_the_same_model_with_a_frozen_backbone(task, config) -> None:
    from fedkit.clients.adapters import get_adapter

    model, again = task.build_model(config), task.build_model(config)
    adapter, other = get_adapter(model), get_adapter(again)
    assert all(np.array_equal(adapter[name], other[name]) for name in adapter)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trainable)
    assert 15_000 <= sum(array.size for array in adapter.values()) <= 60_000


def test_one_local_training_lowers_the_loss_and_leaves_the_backbone(task, config) -> None:
    model = task.build_model(config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    images, labels = task.load_partition(config, 0)
    before = task.evaluate(model, images, labels)["loss"]
    metrics = task.train(model, images, labels, config, seed=0)
    assert task.evaluate(model, images, labels)["loss"] < before
    assert set(metrics) == {"train-loss", "effective-rank"}
    assert all((model.get_parameter(name) == value).all() for name, value in frozen.items())


def test_a_model_that_served_other_messages_trains_to_the_same_bits_as_a_fresh_one(task, config) -> None:
    from fedkit.clients.adapters import get_adapter, set_adapter

    images, labels = task.load_partition(config, 0)
    fresh, used = task.build_model(config), task.build_model(config)
    sent = get_adapter(fresh)
    task.train(used, images, labels, config, seed=1)
    task.evaluate(used, images, labels)
    set_adapter(used, sent)
    metrics = [task.train(model, images, labels, config, seed=0) for model in (fresh, used)]
    assert metrics[0] == metrics[1]
    assert all(np.array_equal(get_adapter(used)[name], array) for name, array in get_adapter(fresh).items())


@pytest.mark.parametrize("strategy", ["aquila", "tac"])
def test_a_server_without_torch_ends_with_the_same_adapter_and_accuracy(
    task, run_config, monkeypatch, tmp_path, strategy
) -> None:
    client_app, server_app = (
        __import__("quickstart.client_app").client_app,
        __import__("quickstart.server_app").server_app,
    )

    def run(folder):
        config = run_config | {"num-clients": 2, "num-rounds": 1, "strategy": strategy, "run-dir": str(folder)}
        grid = InProcessGrid([client_app.app] * 2)
        for context in grid.contexts.values():
            context.run_config = config
        context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config)
        server_app.app(grid, context)
        rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        return load_file(folder / "adapter" / "adapter_model.safetensors"), rows

    expected, rows = run(tmp_path / "with")
    monkeypatch.setattr(task, "HAS_TORCH", False)
    found, asked = run(tmp_path / "without")
    assert all(np.array_equal(found[name], array) for name, array in expected.items())
    for row, other in zip(rows[1:], asked[1:], strict=True):
        assert other["accuracy"] == pytest.approx(row["accuracy"])
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-5)
    assert rows[0]["uplink-bytes"] == 0
    assert asked[0]["uplink-bytes"] > 50_000, "a client was asked for its adapter"


def test_weights_have_their_published_digest() -> None:
    path = asset_path(ASSET)
    assert path.stat().st_size <= 2_000_000


def test_other_bytes_and_unknown_assets_are_refused(monkeypatch) -> None:
    monkeypatch.setitem(assets.SHA256, ASSET, "0" * 64)
    with pytest.raises(FedkitError, match="SHA-256"):
        asset_path(ASSET)
    with pytest.raises(FedkitError, match="unknown asset"):
        asset_path("other.safetensors")
