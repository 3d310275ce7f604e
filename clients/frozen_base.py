"""Frozen linear layers in fewer bytes: int8 on a CPU, bfloat16 on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from fedkit.errors import ConfigError

from .resident import page_out


def frozen_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers whose weights are not trained, including LoRA's base layers.

    PEFT's copies of the original modules, kept for those that are trained whole (`modules_to_save`), are left out.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and ".original_module" not in name:
            yield name, module


def quantize_base(model: nn.Module, check: Callable[[], None] = lambda: None) -> None:
    """Convert the weights of frozen linear layers to int8, in place, with a scale for each output (torchao).

    Layers are converted one by one, so that there is never a second copy of all weights. Gradients pass through to
    lower layers. A layer converts its weights back to float to compute, and autograd keeps these copies, of all
    layers at once, unless the model checkpoints its activations.

    Parameters
    ----------
    model : nn.Module
        The model with its adapter.
    check : callable
        Called before each layer is converted.

    Raises
    ------
    ConfigError
        If torchao is not installed.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError:
        raise ConfigError(
            "profile 'mobile' keeps the frozen layers in int8 with torchao, which is not installed. Run "
            "`pip install 'fedkit[mobile]'`, or set another profile in the node config."
        ) from None
    for _, layer in list(frozen_linears(model)):
        check()
        weight = layer.weight
        quantize_(layer, Int8WeightOnlyConfig(), filter_fn=lambda module, _: isinstance(module, nn.Linear))
        page_out(weight.data_ptr(), weight.nbytes)


def cast_base(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights of frozen linear layers once, in place; autocast would do so again in every step."""
    for _, layer in frozen_linears(model):
        layer.to(dtype)


def checkpoint_activations(model: nn.Module) -> None:
    """Recompute activations in the backward pass instead of storing them, where transformers' models can."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.supports_gradient_checkpointing:
            # Renamed in transformers 5.23, where the old name warns.
            enable = getattr(part, "activation_checkpointing_enable", None) or part.gradient_checkpointing_enable
            enable({"use_reentrant": False})
