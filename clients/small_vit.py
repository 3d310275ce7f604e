"""The vision transformer that ships with fedkit: 0.45 million parameters, for grey images of 8x8 pixels.

Its weights were trained on Fashion-MNIST by `examples/quickstart/pretrain.py`.
"""

from __future__ import annotations

import warnings

from safetensors.torch import load_file

from fedkit.assets import asset_path
from fedkit.errors import ConfigError

from .broken_torchvision import naming_torchvision

with naming_torchvision():
    from transformers import ViTConfig, ViTForImageClassification

ASSET = "vit_8x8.safetensors"


def build_small_vit(num_labels: int) -> ViTForImageClassification:
    """Return the transformer without pre-trained weights."""
    return ViTForImageClassification(
        ViTConfig(  # type: ignore[call-arg]  # every config has num_labels
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=96,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=384,
            num_labels=num_labels,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def load_small_vit(num_labels: int) -> ViTForImageClassification:
    """Return the pre-trained transformer with a new head, initialized from torch's random state.

    Raises
    ------
    ConfigError
        If this version of transformers names the layers differently.
    """
    model = build_small_vit(num_labels)
    pretrained = {name: value.float() for name, value in load_file(asset_path(ASSET)).items()}
    missing, unexpected = model.load_state_dict(pretrained, strict=False)
    if unexpected or any(not name.startswith("classifier.") for name in missing):
        raise ConfigError(f"{ASSET} does not fit this version of transformers: {missing + unexpected}.")
    # peft 0.21 uses an attribute that is deprecated in transformers 5.23.
    warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
    return model
