"""Data of the vision example: images of torchvision, `datasets` or scikit-learn, shared out and transformed."""

from __future__ import annotations

from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fedkit.clients.broken_torchvision import naming_torchvision
from fedkit.clients.partition import partition
from fedkit.config import check_keys
from fedkit.errors import ConfigError
from vision.model import input_format
from vision.task import Config

with naming_torchvision():
    import torchvision.datasets
    from torchvision.transforms import v2

NUM_TEST_DIGITS = 540
Labelled: TypeAlias = tuple[Any, NDArray[np.int64]]
"""A source, of which ``source[i]`` is a PIL image and its label, and all labels."""


@dataclass(frozen=True, slots=True)
class Images(Dataset[dict[str, Any]]):
    """Some rows of a source, as `model(**batch)` takes them: an image is transformed when it is asked for."""

    source: Any
    labels: NDArray[np.int64]
    rows: NDArray[np.int64]
    transform: v2.Transform

    def __len__(self) -> int:
        """Return how many images there are."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor | int]:
        """Return the model's input of one image."""
        row = int(self.rows[index])
        return {"pixel_values": self.transform(self.source[row][0]), "labels": int(self.labels[row])}


def load_partition(config: Config, partition_id: int) -> Images:
    """Return the images of one client, to train with."""
    source, labels = _load(config, train=True)
    sizes = {"num_clients": config.num_clients, "at_least": config.batch_size}
    parts = partition(labels, alpha=config.dirichlet_alpha, seed=config.seed, **sizes)
    return Images(source, labels, parts[partition_id], make_transform(config, train=True))


def load_test(config: Config) -> Images:
    """Return the images to test with, at most `max-test`: the same in every run."""
    source, labels = _load(config, train=False)
    rows = np.random.default_rng(0).permutation(len(labels))[: config.max_test or None]
    return Images(source, labels, rows, make_transform(config, train=False))


def make_transform(config: Config, *, train: bool) -> v2.Transform:
    """Return what makes the model's input of a PIL image; in training, another one each time."""
    form = input_format(config)
    augment = [
        v2.RandomCrop(form.size, padding=round(config.shift * form.size)),
        v2.RandomHorizontalFlip(config.flip),
    ]
    return v2.Compose(
        [
            v2.RGB() if form.channels == 3 else v2.Grayscale(),
            v2.ToImage(),
            v2.Resize((form.size, form.size)),
            *(augment if train else []),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(form.mean, form.std),
        ]
    )


def _load(config: Config, *, train: bool) -> Labelled:
    """Return the images to train with, or those to test with; raises ConfigError if there are none."""
    if config.dataset == "digits":
        return _load_digits(train)
    if config.dataset != "datasets":
        check_keys([config.dataset], torchvision.datasets.__all__, what="class of torchvision.datasets")
    try:
        source, labels = (_load_datasets if config.dataset == "datasets" else _load_torchvision)(config, train)
    except ConfigError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"data: expected what {config.dataset} reads, with the whole path of its folder, got {config.data!r} "
            f"({error}). Where data come from the Internet, `download=true` lets torchvision fetch them."
        ) from error
    if not np.isin(labels, range(config.num_labels)).all():
        raise ConfigError(
            f"{config.dataset}: expected labels 0 to {config.num_labels - 1}, "
            f"got {labels.min()} to {labels.max()}. Set num-labels."
        )
    return source, labels


def _load_digits(train: bool) -> Labelled:
    """Return scikit-learn's digits, 8x8 grey images: the same 540 are for the test in every run."""
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    rows = np.arange(len(digits.target))
    parts = train_test_split(rows, test_size=NUM_TEST_DIGITS, stratify=digits.target, random_state=0)
    chosen = parts[0 if train else 1]
    grey = (digits.images[chosen] * (255 / 16)).astype(np.uint8)
    labels = digits.target[chosen].astype(np.int64)
    return list(zip(map(Image.fromarray, grey), labels, strict=True)), labels


def _load_torchvision(config: Config, train: bool) -> Labelled:
    """Return one half of a data set of torchvision; if it knows none, of its folder train/ or test/ (or val/)."""
    kind, root = getattr(torchvision.datasets, config.dataset), Path(config.data)
    takes = signature(kind).parameters
    options: dict[str, Any] = {"download": True} if config.download and "download" in takes else {}
    if "train" in takes:
        options["train"] = train
    elif "split" in takes:
        options["split"] = "train" if train else "test"
    else:
        names = ("train",) if train else ("test", "val")
        root = next((root / name for name in names if (root / name).is_dir()), root / names[0])
    source = kind(root, **options)
    labels = getattr(source, "targets", getattr(source, "labels", None))  # which of them, it depends
    if labels is None:
        labels = [label for _, label in source]
    return source, np.asarray(labels, np.int64)


@dataclass(frozen=True, slots=True)
class _Pairs:
    """Rows of `datasets` as pairs of an image and its label."""

    rows: Any
    image: str
    label: str

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.rows[index]
        return row[self.image], row[self.label]


def _load_datasets(config: Config, train: bool) -> Labelled:
    """Return one split of a saved `DatasetDict`, of a folder, or of a data set on the hub."""
    from datasets import load_dataset, load_from_disk

    saved = Path(config.data, "dataset_dict.json").exists()
    splits = load_from_disk(config.data) if saved else load_dataset(config.data, config.data_config or None)
    names = ("train",) if train else ("test", "validation")
    name = next((name for name in names if name in splits), None)
    if name is None:
        raise ConfigError(f"data: expected a split {' or '.join(names)}, got {sorted(splits)} in {config.data!r}.")
    rows = splits[name]
    for column in (config.image_column, config.label_column):
        if column not in rows.column_names:
            raise ConfigError(f"{name}: expected a column {column!r}, got {', '.join(rows.column_names)}.")
    labels = np.asarray(rows.with_format("numpy")[config.label_column][:], np.int64)
    return _Pairs(rows, config.image_column, config.label_column), labels
