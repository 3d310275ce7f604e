"""The layers that training leaves alone, in fewer bytes: int8 on a CPU, bfloat16 on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers import PreTrainedModel

from fedkit.errors import ConfigError

from .resident import page_out


def frozen_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Yield the linear layers whose weights are not trained, LoRA's base layers among them.

    The copy that PEFT keeps of a module that is trained whole (`modules_to_save`) is left out.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and ".original_module" not in name:
            yield name, module


def quantize_base(model: nn.Module, check: Callable[[], None] = lambda: None) -> None:
    """Make the weights of frozen linear layers int8, in place, with a scale for each output (torchao).

    Layer by layer, so that there is never a second copy of all. Gradients flow through to lower layers; the
    weights become float again where a layer computes, and autograd keeps that copy, all layers' at once, unless
    the model checkpoints its activations.

    Parameters
    ----------
    model : nn.Module
        With its adapter.
    check : callable
        Called before each layer.

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
    """Cast the weights of frozen linear layers, in place: what autocast would do again in every step."""
    for _, layer in frozen_linears(model):
        layer.to(dtype)


def checkpoint_activations(model: nn.Module) -> None:
    """Compute activations again in the backward pass instead of keeping them, where transformers' models can."""
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and part.supports_gradient_checkpointing:
            # Renamed in transformers 5.23, where the old name warns.
            enable = getattr(part, "activation_checkpointing_enable", None) or part.gradient_checkpointing_enable
            enable({"use_reentrant": False})
