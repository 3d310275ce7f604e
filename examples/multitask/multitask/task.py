"""Tasks, model, data, training and evaluation of the multitask example.

Five tasks ask different things of scikit-learn's 1797 handwritten digits. Each task's training images are spread
unevenly over the clients, so that most hold a few of the tasks. The model is the quickstart's: a frozen vision
transformer of 0.45 million parameters; an adapter is LoRA of rank 1 and a head. torch is imported inside the
functions: Flower imports this module for every message, also where nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedkit.clients.partition import split
from fedkit.config import RunConfig, check_keys
from fedkit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
TASKS = {
    "digit": tuple(range(10)),
    "parity": (0, 1, 0, 1, 0, 1, 0, 1, 0, 1),
    "large": (0, 0, 0, 0, 0, 1, 1, 1, 1, 1),
    "prime": (0, 0, 1, 1, 0, 1, 0, 1, 0, 0),
    "round": (1, 0, 0, 0, 0, 0, 1, 0, 1, 1),
}
"""Name to the answer for each digit. Every head has ten outputs, so that all adapters have one shape."""
OUTPUTS = 10
NUM_TEST = 540
MIN_SHARE = 0.01
"""Below this share of a task's images a client does not hold the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """The keys of `[tool.flwr.app.config]`, typed; each stands there in kebab-case."""

    learning_rate: float
    local_steps: int  # for each task of a client
    batch_size: int
    r: int  # of one task's adapter
    lora_alpha: int
    dirichlet_alpha: float  # how unevenly tasks are spread: 100 is evenly
    clustering: str  # of tac: "distinct"; "k-means": as published; "oracle": told the tasks, for comparison
    heads: str  # of fedavg's adapter: "one", or one "per-task", as if all agreed on what the tasks are

    def __post_init__(self) -> None:
        # Named, for a dataclass with slots is another class than the one `super()` was compiled in.
        RunConfig.__post_init__(self)
        check_keys([self.strategy], ["tac", "fedavg"], what="strategy")
        check_keys([self.clustering], ["distinct", "k-means", "oracle"], what="clustering")
        check_keys([self.heads], ["one", "per-task"], what="heads")

    @property
    def shared(self) -> bool:
        """Whether there is one adapter for all tasks; it is then as large as all of theirs."""
        return self.strategy == "fedavg"

    @property
    def num_heads(self) -> int:
        """How many heads an adapter has."""
        return len(TASKS) if self.shared and self.heads == "per-task" else 1


def build_model(config: Config) -> PeftModel:
    """Return the frozen pre-trained transformer with a fresh adapter, the same for the same seed."""
    import torch
    from peft import LoraConfig, get_peft_model

    from fedkit.clients.small_vit import load_small_vit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        size = len(TASKS) if config.shared else 1
        return get_peft_model(
            load_small_vit(OUTPUTS * config.num_heads),
            LoraConfig(
                r=config.r * size,
                lora_alpha=config.lora_alpha * size,
                target_modules=list(TARGETS),
                modules_to_save=["classifier"],
            ),
        )


def load_split() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return training images in [0, 1] of shape (n, 8, 8), their digits, then the same of the test set.

    The split does not depend on any seed: all runs are tested on the same images.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_TEST, stratify=digits.target, random_state=0
    )
    images, labels = (digits.images / 16).astype(np.float32), digits.target.astype(np.int64)
    return images[train], labels[train], images[test], labels[test]


def answers(name: str, digits: NDArray[np.int64], config: Config) -> NDArray[np.int64]:
    """Return the labels of a task for images of these digits, as numbers of outputs, head after head."""
    head = list(TASKS).index(name) % config.num_heads
    return np.asarray(TASKS[name], np.int64)[digits] + OUTPUTS * head


def partition(num_images: int, *, num_clients: int, alpha: float, seed: int) -> list[dict[str, NDArray[np.int64]]]:
    """Return each client's tasks with the indices of their images, every task spread by Dirichlet(`alpha`).

    Raises
    ------
    ConfigError
        If no draw leaves every client a task.
    """
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        parts: list[dict[str, NDArray[np.int64]]] = [{} for _ in range(num_clients)]
        for name in TASKS:
            shares = rng.dirichlet(np.full(num_clients, alpha))
            for part, piece in zip(parts, split(rng.permutation(num_images), shares), strict=True):
                if len(piece) >= MIN_SHARE * num_images:
                    part[name] = piece
        if all(parts):
            return parts
    raise ConfigError(
        f"no split gives each of {num_clients} clients a task at dirichlet-alpha {alpha}. "
        "Take fewer clients or a larger dirichlet-alpha."
    )


class Slot(NamedTuple):
    """What one adapter of a client is trained with."""

    images: NDArray[np.float32]  # shape (n, 8, 8)
    labels: NDArray[np.int64]
    steps: int  # in each round


def load_slots(config: Config, partition_id: int) -> list[Slot]:
    """Return a slot for each task of one client; only one, with all of them, if the adapter is shared."""
    images, digits, _, _ = load_split()
    part = _partition(config)[partition_id]
    slots = [
        Slot(images[ids], answers(name, digits[ids], config), config.local_steps) for name, ids in part.items()
    ]
    if config.shared:
        together = (np.concatenate(column) for column in list(zip(*slots, strict=True))[:2])
        return [Slot(*together, sum(slot.steps for slot in slots))]
    return slots


def true_tasks(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the task of each slot, as its number in `TASKS`, by client id; only evaluation may know."""
    numbers = {name: number for number, name in enumerate(TASKS)}
    return {str(i): tuple(numbers[name] for name in part) for i, part in enumerate(_partition(config))}


def _partition(config: Config) -> list[dict[str, NDArray[np.int64]]]:
    num_images = len(load_split()[0])
    return partition(num_images, num_clients=config.num_clients, alpha=config.dirichlet_alpha, seed=config.seed)


def local_seed(config: Config, *numbers: int) -> int:
    """Return the seed of one training: another for each round, client and slot, the same when run again."""
    return int(np.random.SeedSequence((config.seed, *numbers)).generate_state(1)[0])


def to_pixel_values(images: NDArray[np.float32]) -> torch.Tensor:
    """Return the model's input for images in [0, 1]: one channel, centred to [-1, 1]."""
    import torch

    return torch.from_numpy(images[:, None] * 2 - 1)


def train(model: PeftModel, slot: Slot, config: Config, *, seed: int) -> float:
    """Train the adapter of `model` in place with SGD; return the mean loss."""
    import torch

    pixel_values, targets = to_pixel_values(slot.images), torch.from_numpy(slot.labels)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trainable, lr=config.learning_rate, momentum=0.9)
    rng, losses = np.random.default_rng(seed), []
    model.train()
    for _ in range(slot.steps):
        batch = torch.from_numpy(rng.choice(len(targets), config.batch_size))
        loss = torch.nn.functional.cross_entropy(*_own_head(model, pixel_values[batch], targets[batch]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def accuracy(model: PeftModel, images: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """Return the share of images that `model` answers rightly, in [0, 1]."""
    import torch

    model.eval()
    with torch.inference_mode():
        logits, targets = _own_head(model, to_pixel_values(images), torch.from_numpy(labels))
    return float((logits.argmax(-1) == targets).float().mean())


def _own_head(
    model: PeftModel, pixel_values: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the logits of the head that each label belongs to, and the labels within it."""
    heads = model(pixel_values=pixel_values).logits.unflatten(-1, (-1, OUTPUTS))
    return heads[range(len(labels)), labels // OUTPUTS], labels % OUTPUTS
