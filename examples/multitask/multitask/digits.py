"""Five questions about scikit-learn's 1797 handwritten digits, for the quickstart's frozen vision transformer."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from multitask.examples import Examples

if TYPE_CHECKING:
    import torch
    from torch import nn

    from multitask.task import Config

ANSWERS = {
    "digit": tuple(range(10)),
    "parity": (0, 1, 0, 1, 0, 1, 0, 1, 0, 1),
    "large": (0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    "prime": (0, 0, 1, 1, 0, 1, 0, 1, 0, 0),
    "round": (1, 0, 0, 0, 0, 0, 1, 0, 1, 1),
}
"""Name to the answer for each digit. Every head has ten outputs, so that all adapters have one shape."""
OUTPUTS = 10
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD = "classifier"
NUM_TEST = 540


def names(config: Config) -> tuple[str, ...]:
    """Return the names of the tasks."""
    return tuple(ANSWERS)


def size(config: Config, name: str) -> int:
    """Return how many examples of a task there are to train with."""
    return len(_split()[1])


def examples(config: Config, name: str, ids: NDArray[np.int64]) -> Examples:
    """Return examples of a task to train with."""
    images, digits, _, _ = _split()
    return _asked(name, images[ids], digits[ids])


def tests(config: Config, name: str) -> Examples:
    """Return the examples that a task is tested on, the same for all seeds."""
    _, _, images, digits = _split()
    return _asked(name, images, digits)


def build_base(config: Config, outputs: int) -> nn.Module:
    """Return the pre-trained transformer with a fresh head."""
    from fedkit.clients.small_vit import load_small_vit

    base: nn.Module = load_small_vit(outputs)
    return base


def optimizer(parameters: list[Any], config: Config) -> torch.optim.Optimizer:
    """Return what trains an adapter."""
    import torch

    return torch.optim.SGD(parameters, lr=config.learning_rate, momentum=0.9)


def _asked(name: str, images: NDArray[np.float32], digits: NDArray[np.int64]) -> Examples:
    """Return images, one channel, centred to [-1, 1], and the answers to one question."""
    return Examples({"pixel_values": images[:, None] * 2 - 1}, np.asarray(ANSWERS[name], np.int64)[digits])


@cache
def _split() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return training images in [0, 1] of shape (n, 8, 8), their digits, then the same of the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_TEST, stratify=digits.target, random_state=0
    )
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    return images[train], labels[train], images[test], labels[test]
