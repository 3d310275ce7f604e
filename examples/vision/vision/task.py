"""Training and evaluation of the vision example; its data are in `data`, its model in `model`.

torch is imported inside the functions: Flower imports this module for every message, also where nothing is
trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedkit.config import RunConfig
from fedkit.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftModel

    from fedkit.clients.profiles import Profile
    from fedkit.row_masks import RowDraw
    from vision.data import Images

BATCH = 100
"""How many images are tested at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """The keys of `[tool.flwr.app.config]`, typed; each stands there in kebab-case."""

    model: str  # a folder or a name on the hub; empty: the small transformer that ships with fedkit
    target_modules: str  # the layers that carry LoRA factors, separated by blanks
    dataset: str  # "digits", a class of torchvision.datasets, or "datasets": what that library loads
    data: str  # for torchvision the whole path of its root; for `datasets` a folder or a name on the hub
    data_config: str  # which configuration of a data set on the hub, if it has several
    download: bool  # whether torchvision may
    image_column: str  # this and the next: of `datasets`
    label_column: str
    num_labels: int
    max_test: int  # the test takes no more images than that; 0: all
    shift: float  # by up to which share of their size images are moved in training
    flip: float  # probability that one is mirrored in training: 0 for digits, 0.5 for most photographs
    dirichlet_alpha: float  # how unevenly labels are spread: 100 is even, 0.1 gives most clients few classes
    learning_rate: float
    local_steps: int
    batch_size: int
    r: int
    lora_alpha: int
    active_rank: int  # `r`, with an `orth_reg_weight` of 0: plain LoRA
    orth_reg_weight: float

    def __post_init__(self) -> None:
        # Named, for a dataclass with slots is another class than the one `super()` was compiled in.
        RunConfig.__post_init__(self)
        for name in ("shift", "flip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}: expected a share from 0 to 1, got {getattr(self, name)}.")


def local_seed(config: Config, server_round: int, partition_id: int) -> int:
    """Return the seed of one client's training in one round: another for each, the same when run again."""
    return int(np.random.SeedSequence((config.seed, server_round, partition_id)).generate_state(1)[0])


def train(
    model: PeftModel,
    images: Images,
    config: Config,
    *,
    seed: int,
    profile: Profile | None = None,
    draw: RowDraw | None = None,
) -> dict[str, float]:
    """Train the adapter of `model` in place with RM-LoRA, `local-steps` batches; return the metrics.

    `profile` says what the device can carry, `draw` which rows of the factors the server wants trained, if any.
    """
    from torch.utils.data import DataLoader, RandomSampler

    from fedkit.clients.rm_lora import RMLoraConfig, train_rm_lora

    sampler = RandomSampler(images, num_samples=config.local_steps * config.batch_size)
    rm_lora = RMLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        active_rank=config.active_rank,
        orth_reg_weight=config.orth_reg_weight,
        target_modules=tuple(config.target_modules.split()),
    )
    return train_rm_lora(
        model,
        DataLoader(images, config.batch_size, sampler=sampler),  # it draws, and augments, by `seed`
        rm_lora,
        learning_rate=config.learning_rate,
        seed=seed,
        rows=draw,
        profile=profile,
    )


def evaluate(model: PeftModel, images: Images) -> dict[str, float]:
    """Return the accuracy, a share in [0, 1], and the mean loss of `model` on the images."""
    import torch
    from torch.utils.data import DataLoader

    model.eval()
    right, loss = 0, 0.0
    with torch.inference_mode():
        for batch in DataLoader(images, BATCH):
            output, labels = model(**batch), batch["labels"]
            right += int((output.logits.argmax(-1) == labels).sum())
            loss += float(output.loss) * len(labels)
    return {"accuracy": right / len(images), "loss": loss / len(images)}
