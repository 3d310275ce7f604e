"""The trainable part of a stock PEFT model as named float32 arrays, and back."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from fedkit.adapter import CONFIG_NAME, Adapter
from fedkit.arrays import NamedArrays, check_same_schema
from fedkit.submodels import is_factor

from .broken_torchvision import naming_torchvision

with naming_torchvision():
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict


def get_adapter(model: PeftModel) -> dict[str, NDArray[np.float32]]:
    """Return copies of the active adapter's arrays: LoRA factors, then the modules of `modules_to_save`.

    Names are PEFT's own, without the adapter's name. Their order is that of the model's modules, so it is the
    same on every machine that builds the same model. bfloat16 and float16 fit into float32 exactly.
    """
    state = get_peft_model_state_dict(
        model,
        adapter_name=model.active_adapter,
        # "auto" would ship frozen embeddings that LoRA merely targets, and may ask the hub for a config.
        save_embedding_layers=False,
    )
    return {
        name: value.detach().to(device="cpu", dtype=torch.float32, copy=True).numpy()
        for name, value in state.items()
    }


def freeze_lora_a(model: PeftModel) -> None:
    """Freeze every lora_A of the active adapter, as a server with ``lora="ffa"`` requires."""
    for name, parameter in model.named_parameters():
        if is_factor(name, "lora_A"):
            parameter.requires_grad_(False)


def describe(model: PeftModel) -> Adapter:
    """Return the active adapter with its PEFT config, in the form that a server without torch needs."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, selected_adapters=[model.active_adapter], save_embedding_layers=False)
        (path,) = Path(folder).rglob(CONFIG_NAME)
        return Adapter(get_adapter(model), path.read_text(encoding="utf-8"))


def set_adapter(model: PeftModel, arrays: NamedArrays) -> None:
    """Write `arrays`, as returned by `get_adapter`, into the active adapter of `model`.

    ``set_adapter(model, get_adapter(model))`` changes no bit.

    Raises
    ------
    SchemaMismatchError
        If an array is missing, unknown or of another shape, as with another LoRA rank; the message names the
        first such array. The model is left unchanged.
    """
    check_same_schema(arrays, like=get_adapter(model))
    state = {name: torch.from_numpy(np.array(array, np.float32)) for name, array in arrays.items()}
    set_peft_model_state_dict(model, state, adapter_name=model.active_adapter)
