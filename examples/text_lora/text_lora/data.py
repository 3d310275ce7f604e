"""Data of the text example: whatever `datasets` loads, or sentences of two manuals; and each client's share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray

from fedkit.clients.partition import partition
from fedkit.errors import ConfigError
from text_lora.task import Config

NUM_DEV = 400
"""How many sentences of the manuals are for the test; other data say so themselves."""
DEV_SPLITS = ("dev", "validation", "test")
"""What the rows to test with are called; the first that there is."""


def load_split(config: Config) -> tuple[Dataset, Dataset]:
    """Return the rows to train with and those to test with.

    Raises
    ------
    ConfigError
        If data, a split or a column is missing, or a label is none of 0 to `num-labels` - 1.
    """
    splits = _load(config.data, config.data_config) if config.data else _load_manuals()
    dev = next((name for name in DEV_SPLITS if name in splits), None)
    if "train" not in splits or dev is None:
        raise ConfigError(
            f"data: expected splits 'train' and one of {DEV_SPLITS}, got {sorted(splits)} in {config.data!r}."
        )
    _check(splits["train"], config, "train")
    _check(splits[dev], config, dev)
    return splits["train"], splits[dev]


def load_partition(config: Config, partition_id: int) -> Dataset:
    """Return the rows of one client: uneven in their labels, or an even share of texts to model."""
    rows, _ = load_split(config)
    if config.task == "language-modelling":
        rows = rows.shuffle(seed=config.seed).shard(config.num_clients, partition_id)
        if len(rows) < config.batch_size:
            raise ConfigError(
                f"data: expected {config.batch_size} texts or more for each client, got {len(rows)}. "
                "Take fewer clients or a smaller batch-size."
            )
        return rows
    parts = partition(
        labels_of(rows, config),
        num_clients=config.num_clients,
        alpha=config.dirichlet_alpha,
        seed=config.seed,
        at_least=config.batch_size,
    )
    return rows.select(parts[partition_id])


def labels_of(rows: Dataset, config: Config) -> NDArray[np.int64]:
    """Return the labels of all rows."""
    return np.asarray(rows.with_format("numpy")[config.label_column][:])


def _load(data: str, data_config: str) -> Mapping[str, Dataset]:
    """Return the splits of a saved `DatasetDict`, a folder of data files, or a data set on the hub."""
    try:
        if Path(data, "dataset_dict.json").exists():
            return load_from_disk(data)
        return load_dataset(data, data_config or None)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"data: expected the whole path of a folder with train.jsonl and dev.jsonl, or whatever else "
            f"`datasets.load_dataset` takes, got {data!r} ({error})."
        ) from error


def _load_manuals() -> Mapping[str, Dataset]:
    """Return sentences of two manuals, label 0 for Python's, 1 for NumPy's; the split depends on no seed."""
    from text_lora import manuals

    python, numpy = manuals.load()
    rows = Dataset.from_dict({"text": python + numpy, "label": [0] * len(python) + [1] * len(numpy)})
    order = np.random.default_rng(0).permutation(len(rows))
    return {"train": rows.select(order[NUM_DEV:]), "dev": rows.select(order[:NUM_DEV])}


def _check(rows: Dataset, config: Config, name: str) -> None:
    """Raise ConfigError if rows lack what `config` says they have."""
    classify = config.task == "classification"
    for column in (config.text_column, config.label_column) if classify else (config.text_column,):
        if column not in rows.column_names:
            raise ConfigError(f"{name}: expected a column {column!r}, got {', '.join(rows.column_names)}.")
    if not classify:
        return
    labels = labels_of(rows, config)
    if labels.dtype.kind not in "iu" or not np.isin(labels, range(config.num_labels)).all():
        raise ConfigError(
            f"{name}: expected labels 0 to {config.num_labels - 1} in {config.label_column!r}, "
            f"got {sorted(set(labels.tolist()), key=str)[:10]}. Set num-labels, or number them anew."
        )
