"""Model, data, training and evaluation of the quickstart.

The model is a vision transformer of 0.45 million parameters, pre-trained on Fashion-MNIST (pretrain.py)
and frozen; LoRA and a new head are what the clients train. The data are scikit-learn's 1797 handwritten
digits, split over the clients with label skew. torch is imported inside the functions: Flower imports
this module for every message, also where nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from fedkit.adapter import Adapter
from fedkit.arrays import NamedArrays
from fedkit.clients.partition import partition
from fedkit.config import RunConfig
from fedkit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from peft import PeftModel
    from transformers import ViTForImageClassification

    from fedkit.clients.profiles import Profile
    from fedkit.clients.rm_lora import RMLoraConfig
    from fedkit.row_masks import RowDraw

HAS_TORCH = find_spec("torch") is not None
NUM_CLASSES = 10
NUM_TEST = 540


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """The keys of `[tool.flwr.app.config]`, typed; each stands there in kebab-case."""

    learning_rate: float
    local_epochs: int
    batch_size: int
    r: int
    lora_alpha: int
    active_rank: int
    orth_reg_weight: float
    partition: str  # "dirichlet": label skew; "halves": half of the clients hold 0 to 4, the others 5 to 9
    dirichlet_alpha: float  # 100 is even, 0.1 gives most clients two or three digits
    drop_half: float  # probability that a reply of the first half is lost, above 0 (not with fedavg)

    def __post_init__(self) -> None:
        # Named, for a dataclass with slots is another class than the one `super()` was compiled in.
        RunConfig.__post_init__(self)
        if self.partition not in ("dirichlet", "halves"):
            raise ConfigError(f"partition: expected 'dirichlet' or 'halves', got {self.partition!r}.")


def rm_lora(config: Config) -> RMLoraConfig:
    """Return the RM-LoRA settings: all attention projections carry LoRA factors."""
    from fedkit.clients.rm_lora import RMLoraConfig

    return RMLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        active_rank=config.active_rank,
        mask="paired",
        orth_reg_weight=config.orth_reg_weight,
        target_modules=("q_proj", "k_proj", "v_proj", "o_proj"),
    )


def build_model(config: Config) -> PeftModel:
    """Return the frozen pre-trained transformer with a fresh adapter, the same for the same seed."""
    import torch
    from peft import LoraConfig, get_peft_model

    from fedkit.clients.small_vit import load_small_vit

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        settings = rm_lora(config)
        return get_peft_model(
            load_small_vit(NUM_CLASSES),
            LoraConfig(
                r=settings.r,
                lora_alpha=settings.lora_alpha,
                target_modules=list(settings.target_modules),
                modules_to_save=["classifier"],
            ),
        )


def load_model(config: Config, profile: Profile) -> PeftModel:
    """Return the model as a device with this profile trains it."""
    return profile.prepare(build_model(config))


def initial_adapter(config: Config) -> Adapter:
    """Return the adapter that training starts from, the same on every machine with the same seed."""
    from fedkit.clients.adapters import describe

    return describe(build_model(config))


def load_split() -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]:
    """Return training images in [0, 1] of shape (n, 8, 8), their labels, then the same of the test set.

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


def halves(labels: NDArray[np.int64], *, num_clients: int, seed: int) -> list[NDArray[np.int64]]:
    """Return each client's indices into `labels`, the first half of the classes going to the first half."""
    order = np.random.default_rng(seed).permutation(len(labels))
    middle, first = np.unique(labels)[NUM_CLASSES // 2], num_clients // 2
    low, high = order[labels[order] < middle], order[labels[order] >= middle]
    return [*np.array_split(low, first), *np.array_split(high, num_clients - first)]


def load_partition(config: Config, partition_id: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return the training images and labels of one client."""
    images, labels, _, _ = load_split()
    size = {"num_clients": config.num_clients, "seed": config.seed}
    if config.partition == "halves":
        parts = halves(labels, **size)
    else:
        parts = partition(labels, alpha=config.dirichlet_alpha, **size)
    return images[parts[partition_id]], labels[parts[partition_id]]


def local_seed(config: Config, server_round: int, partition_id: int) -> int:
    """Return the seed of one client's training in one round: another for each, the same when run again."""
    return int(np.random.SeedSequence((config.seed, server_round, partition_id)).generate_state(1)[0])


def to_pixel_values(images: NDArray[np.float32]) -> torch.Tensor:
    """Return the model's input for images in [0, 1]: one channel, centred to [-1, 1]."""
    import torch

    return torch.from_numpy(images[:, None] * 2 - 1)


def train(
    model: PeftModel,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    config: Config,
    *,
    seed: int,
    rows: RowDraw | None = None,
    profile: Profile | None = None,
) -> dict[str, float]:
    """Train the adapter of `model` in place with RM-LoRA, of some `rows` or of all; return the metrics."""
    import torch
    from torch.utils.data import DataLoader

    from fedkit.clients.rm_lora import train_rm_lora

    pixel_values = to_pixel_values(images)
    examples = [
        {"pixel_values": image, "labels": label}
        for image, label in zip(pixel_values, torch.from_numpy(labels), strict=True)
    ]
    batches = DataLoader(examples, batch_size=config.batch_size, shuffle=True)
    return train_rm_lora(
        model,
        batches,
        rm_lora(config),
        learning_rate=config.learning_rate,
        epochs=config.local_epochs,
        seed=seed,
        rows=rows,
        profile=profile,
    )


def evaluate(
    model: PeftModel | ViTForImageClassification, images: NDArray[np.float32], labels: NDArray[np.int64]
) -> dict[str, float]:
    """Return the accuracy, a share in [0, 1], and the mean loss of `model` on the images."""
    import torch

    model.eval()
    with torch.inference_mode():
        output = model(pixel_values=to_pixel_values(images), labels=torch.from_numpy(labels))
    accuracy = (output.logits.argmax(-1).numpy() == labels).mean()
    return {"accuracy": float(accuracy), "loss": float(output.loss)}


def evaluator(config: Config, share: slice = slice(None)) -> Callable[[NamedArrays], dict[str, float]]:
    """Return a function from an adapter's arrays to its metrics on a share of the test images, all by default."""
    from fedkit.clients.adapters import set_adapter

    model, (_, _, images, labels) = build_model(config), load_split()

    def measure(adapter: NamedArrays) -> dict[str, float]:
        set_adapter(model, adapter)
        return evaluate(model, images[share], labels[share])

    return measure
