"""FL-TAC's image tasks for `benchmarks.tac`: CIFAR-10, and 50 classes of CIFAR-100, for a small transformer.

It replaces a module of ``examples/multitask`` that has tasks. The transformer is pre-trained on the other 50
classes (`rm_lora_vit`); its last block carries adapters. The outputs of the blocks below are computed once.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from benchmarks.rm_lora_vit import VisionTransformer, backbone, halves, images

CLASSES = {"cifar10": ("cifar10_10k_2k.npz", tuple(range(10))), "cifar100": ("cifar100_10k_2k.npz", halves()[1])}
OUTPUTS = 50
TARGETS = ("query", "value")
HEAD = "head"
_trained: list[VisionTransformer] = []


class Top(nn.Module):
    """The last block, the norm, the mean of the tokens, a head."""

    def __init__(self, model: VisionTransformer, outputs: int) -> None:
        super().__init__()
        self.block, self.norm = copy.deepcopy(model.blocks[-1]), copy.deepcopy(model.norm)
        self.head = nn.Linear(model.norm.normalized_shape[0], outputs)

    def forward(self, hidden: Tensor) -> SequenceClassifierOutput:
        """Return the logits for what the lower blocks made of images."""
        return SequenceClassifierOutput(logits=self.head(self.norm(self.block(hidden.float())).mean(1)))


def names(config: Any) -> tuple[str, ...]:
    """Return the names of the tasks."""
    return tuple(CLASSES)


def size(config: Any, name: str) -> int:
    """Return how many examples of a task there are to train with."""
    return min(config.examples, len(_seen(name, "train").labels))


def examples(config: Any, name: str, ids: NDArray[np.int64]) -> Any:
    """Return examples of a task to train with."""
    whole = _seen(name, "train")
    return type(whole)({"hidden": whole.inputs["hidden"][ids]}, whole.labels[ids])


def tests(config: Any, name: str) -> Any:
    """Return the examples that a task is tested on, the same for all seeds."""
    return _seen(name, "test")


def build_base(config: Any, outputs: int) -> nn.Module:
    """Return the upper part with a fresh head."""
    return Top(_trained[0], outputs)


def optimizer(parameters: list[Any], config: Any) -> torch.optim.Optimizer:
    """Return what trains an adapter, new in each round, as FL-TAC's code has it."""
    return torch.optim.AdamW(parameters, lr=config.learning_rate)


def prepare(cache_dir: str, steps: int | None) -> None:
    """Pre-train the transformer, for some steps instead of all epochs, or read it from the folder."""
    if not _trained:
        _trained.append(backbone(cache_dir, "cuda" if torch.cuda.is_available() else "cpu", steps)[0])


@cache
def _seen(name: str, split: str) -> Any:
    """Return what the lower blocks make of a task's images, in an order that depends on no seed."""
    from multitask.examples import Examples

    model, (pixels, labels) = _trained[0], images(CLASSES[name][0], split, CLASSES[name][1])
    order, device = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)), model.positions.device
    with torch.inference_mode():
        hidden = [model.blocks[:-1](model.tokens(part.to(device))).cpu() for part in pixels[order].split(256)]
    return Examples({"hidden": torch.cat(hidden).half().numpy()}, labels[order].numpy())
