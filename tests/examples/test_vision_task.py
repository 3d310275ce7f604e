"""Laws of the vision example's data, transforms, model and training; the whole app on scikit-learn's digits."""

import dataclasses
import gzip
import json
import os
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedkit.config import parse
from fedkit.errors import ConfigError
from tests.helpers.grid import InProcessGrid

APP = Path(__file__).parents[2] / "examples" / "vision"
RUN_CONFIG = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
pytestmark = pytest.mark.vision


@pytest.fixture(scope="module")
def app():
    """The example's package, with all its modules."""
    pytest.importorskip("torchvision", reason='needs torchvision: see the stage "vision" of .ci/run')
    import torch

    torch.set_num_threads(1)  # as the clients do
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(APP)
        for name in ("data", "task", "model", "client_app", "server_app"):
            __import__(f"vision.{name}")
        yield sys.modules["vision"]
        for name in [name for name in sys.modules if name.partition(".")[0] == "vision"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """The folder of an untrained ViT of one layer for 16x16 images in colour, with its mean and deviation."""
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

    folder = tmp_path_factory.mktemp("vit")
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=7, **size)).save_pretrained(folder)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(folder)
    return str(folder)


def run_config(**changes):
    return RUN_CONFIG | {key.replace("_", "-"): value for key, value in changes.items()}


def config_of(app, **changes):
    return parse(app.task.Config, run_config(**changes))


def pictures(count, size=(20, 20)):
    """Return random images, and labels 0 to 9 in turn."""
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 256, (count, *size, 3), np.uint8)
    return [Image.fromarray(value) for value in values], [i % 10 for i in range(count)]


def image_folder(root, count=200):
    """Make root/train and root/test, with a folder for each of ten classes."""
    for half in ("train", "test"):
        for i, (image, label) in enumerate(zip(*pictures(count), strict=True)):
            folder = root / half / f"class-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            image.save(folder / f"{i}.png")
    return str(root)


def run(app, out, **changes):
    """Run the example in this process; return its rounds."""
    config = run_config(**changes, run_dir=str(out))
    grid = InProcessGrid([app.client_app.app] * config["num-clients"])
    for context in grid.contexts.values():
        context.run_config = config
    app.server_app.app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_run_config_has_exactly_the_fields_of_config(app):
    assert set(RUN_CONFIG) == {field.name.replace("_", "-") for field in dataclasses.fields(app.task.Config)}


def test_clients_share_the_digits_without_overlap_and_the_test_has_540_others(app):
    config = config_of(app)
    parts = [app.data.load_partition(config, client) for client in range(config.num_clients)]
    rows = np.concatenate([part.rows for part in parts])
    assert sorted(rows) == list(range(1797 - 540))
    assert min(map(len, parts)) >= config.batch_size
    assert len(app.data.load_test(config)) == 540
    assert len(app.data.load_test(dataclasses.replace(config, max_test=100))) == 100


def test_without_augmentation_the_model_gets_what_the_quickstart_gives_it(app):
    from sklearn.datasets import load_digits

    config = config_of(app)
    test = app.data.load_test(config)
    values = np.stack([test[i]["pixel_values"].numpy() for i in range(len(test))])
    assert values.shape == (540, 1, 8, 8)
    assert values.min() == -1
    assert values.max() == 1
    known = {
        (np.rint(image)).astype(int).tobytes(): label
        for image, label in zip(*load_digits(return_X_y=True), strict=True)
    }
    found = [known[np.rint((value + 1) * 8).astype(int).tobytes()] for value in values]
    assert found == [test[i]["labels"] for i in range(len(test))]


def test_training_images_are_shifted_and_mirrored_as_the_seed_says_and_test_images_are_not(app):
    import torch

    config = config_of(app, shift=0.125, flip=1.0)
    image, _ = pictures(1, (8, 8))
    train, test = (app.data.make_transform(config, train=train) for train in (True, False))
    plain = test(image[0])
    torch.testing.assert_close(plain, test(image[0]), rtol=0, atol=0)
    padded = torch.nn.functional.pad(plain.flip(-1), (1, 1, 1, 1), value=-1.0)  # black
    shifted = [padded[:, y : y + 8, x : x + 8] for y in range(3) for x in range(3)]
    torch.manual_seed(0)
    seen = [train(image[0]) for _ in range(40)]
    found = [[torch.allclose(one, other, atol=1e-6) for other in shifted] for one in seen]
    assert all(map(any, found)), "mirrored, then moved by at most one pixel"
    assert len({row.index(True) for row in found}) == 9
    torch.manual_seed(0)
    assert all(torch.equal(one, train(image[0])) for one in seen)


def test_a_model_of_ones_own_says_its_size_colours_mean_and_deviation(app, vit):
    import torch

    config = config_of(app, model=vit)
    form = app.model.input_format(config)
    assert (form.size, form.channels, form.mean, form.std) == (16, 3, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    grey = pictures(1)[0][0].convert("L").point(lambda _: 255)
    values = app.data.make_transform(config, train=False)(grey)
    assert values.shape == (3, 16, 16)
    torch.testing.assert_close(values[:, 0, 0], torch.tensor([0.9 / 0.4, 0.8 / 0.5, 0.7 / 0.6]))


def test_a_model_that_says_nothing_of_mean_and_deviation_gets_values_from_minus_one_to_one(app, vit, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(Path(vit) / name)
    form = app.model.input_format(config_of(app, model=str(tmp_path)))
    assert (form.size, form.channels, form.mean, form.std) == (16, 3, (0.5,) * 3, (0.5,) * 3)
    model = app.model.build_model(config_of(app, model=str(tmp_path)))
    assert model.config.num_labels == 10, "it had 7"


def test_an_image_folder_is_read_by_torchvision(app, vit, tmp_path):
    config = config_of(app, dataset="ImageFolder", data=image_folder(tmp_path), model=vit, num_clients=2)
    parts = [app.data.load_partition(config, client) for client in range(2)]
    assert sum(map(len, parts)) == 200
    item = parts[0][0]
    assert item["pixel_values"].shape == (3, 16, 16)
    assert item["labels"] == parts[0].source[int(parts[0].rows[0])][1]
    with pytest.raises(ConfigError, match="expected labels 0 to 4, got 0 to 9"):
        app.data.load_partition(dataclasses.replace(config, num_labels=5), 0)


@pytest.mark.parametrize("saved", [True, False])
def test_datasets_are_read_from_disk_or_from_a_folder_of_images(app, vit, tmp_path, monkeypatch, saved):
    import datasets.config
    from datasets import Dataset, DatasetDict, Features, Image, Value

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "data"
    if saved:
        images, labels = pictures(200)
        features = Features({"image": Image(), "label": Value("int64")})
        rows = Dataset.from_dict({"image": images, "label": labels}, features=features)
        DatasetDict({"train": rows, "test": rows}).save_to_disk(data)
    else:
        image_folder(data)
    config = config_of(app, dataset="datasets", data=str(data), model=vit, num_clients=2)
    part = app.data.load_partition(config, 0)
    assert part[0]["pixel_values"].shape == (3, 16, 16)
    assert part[0]["labels"] == part.source[int(part.rows[0])][1]
    with pytest.raises(ConfigError, match="train: expected a column 'picture', got image, label"):
        app.data.load_partition(dataclasses.replace(config, image_column="picture"), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "CIFAR1O"}, r"unknown class of torchvision\.datasets 'CIFAR1O'. Did you mean 'CIFAR10'"),
        ({"dataset": "CIFAR10", "data": "/no/such/folder"}, "expected what CIFAR10 reads.*download=true"),
        ({"dataset": "ImageFolder", "data": "/no/such/folder"}, "expected what ImageFolder reads"),
        ({"dataset": "EMNIST", "data": "/no/such/folder"}, "expected what EMNIST reads"),
        ({"shift": 2.0}, "shift: expected a share from 0 to 1, got 2"),
    ],
)
def test_data_that_cannot_be_used_are_refused(app, changes, message):
    with pytest.raises(ConfigError, match=message):
        app.data.load_partition(config_of(app, **changes), 0)


def test_fashion_mnist_as_torchvision_reads_it(app, tmp_path):
    source = Path(os.environ.get("FEDKIT_DATA_DIR", "")) / "fashion-mnist"
    if not (source / "train-images-idx3-ubyte.gz").exists():
        pytest.skip("needs fashion-mnist in FEDKIT_DATA_DIR")
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in source.glob("*.gz"):
        (raw / path.stem).write_bytes(gzip.decompress(path.read_bytes()))
    config = config_of(app, dataset="FashionMNIST", data=str(tmp_path), max_test=0)
    assert len(app.data.load_test(config)) == 10_000
    part = app.data.load_partition(config, 3)
    assert part[0]["pixel_values"].shape == (1, 8, 8)
    assert len(part.labels) == 60_000


def test_same_seed_trains_the_same_lowers_the_loss_and_leaves_the_backbone(app):
    from fedkit.clients.adapters import get_adapter

    config = config_of(app, local_steps=20)
    model, again = app.model.build_model(config), app.model.build_model(config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    images = app.data.load_partition(config, 0)
    plain = dataclasses.replace(images, transform=app.data.make_transform(config, train=False))
    before = app.task.evaluate(model, plain)["loss"]
    metrics = app.task.train(model, images, config, seed=0)
    assert set(metrics) == {"train-loss", "effective-rank"}
    assert metrics == app.task.train(again, images, config, seed=0)
    assert app.task.evaluate(model, plain)["loss"] < before / 2
    assert all((model.get_parameter(name) == value).all() for name, value in frozen.items())
    assert all(np.array_equal(a, get_adapter(again)[name]) for name, a in get_adapter(model).items())


@pytest.mark.parametrize("strategy", ["aquila", "safari", "fedavg"])
def test_a_short_run_takes_every_reply_and_saves_the_adapter_that_was_tested(app, tmp_path, strategy):
    from peft import PeftModel

    changes = {"strategy": strategy, "num_rounds": 2, "num_clients": 3, "local_steps": 2}
    rows = run(app, tmp_path, **changes)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all(row["replies"] == 3 and row["rejected"] == row["missing"] == 0 for row in rows[1:])
    assert rows[2]["loss"] != rows[1]["loss"] != rows[0]["loss"]

    config = config_of(app, **changes)
    model = PeftModel.from_pretrained(app.model.build_base(config), str(tmp_path / "adapter"))
    found = app.task.evaluate(model, app.data.load_test(config))
    assert found["loss"] == pytest.approx(rows[2]["loss"], abs=1e-6)
