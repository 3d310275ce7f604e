"""The model: a pre-trained vision transformer with a fresh head; LoRA in the transformer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from fedkit.clients.broken_torchvision import naming_torchvision
from fedkit.clients.profiles import Profile
from fedkit.clients.resident import weight_bytes
from fedkit.clients.small_vit import load_small_vit
from vision.task import Config

with naming_torchvision():
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification


@dataclass(frozen=True, slots=True)
class Format:
    """What a model takes: square images of so many pixels and channels; values less a mean, by a deviation."""

    size: int = 8
    channels: int = 1
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)


def input_format(config: Config) -> Format:
    """Return what the model takes, as its folder says; without a word on mean and deviation they are 0.5."""
    if not config.model:
        return Format()
    about = AutoConfig.from_pretrained(config.model)
    try:
        processor = AutoImageProcessor.from_pretrained(config.model)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except OSError:  # no preprocessor_config.json
        mean = std = (0.5,) * about.num_channels
    return Format(about.image_size, about.num_channels, mean, std)


def build_base(config: Config) -> nn.Module:
    """Return the pre-trained transformer with a head for `num-labels`: what a saved adapter is loaded into."""
    if not config.model:
        return load_small_vit(config.num_labels)
    return AutoModelForImageClassification.from_pretrained(
        config.model, num_labels=config.num_labels, ignore_mismatched_sizes=True
    )


def build_model(config: Config) -> PeftModel:
    """Return the frozen transformer with a fresh adapter, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return get_peft_model(
            build_base(config),
            LoraConfig(
                r=config.r,
                lora_alpha=config.lora_alpha,
                target_modules=config.target_modules.split(),
                modules_to_save=["classifier"],
            ),
        )


def load_model(config: Config, profile: Profile) -> PeftModel:
    """Return the model as a device with this profile trains it; raise MemoryBudgetError if it does not fit."""
    profile.check_memory(weight_bytes(config.model) if config.model else 0)
    return profile.prepare(build_model(config))
