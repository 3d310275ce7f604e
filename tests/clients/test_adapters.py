"""Laws of `fedkit.clients.adapters`."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from fedkit.clients.adapters import freeze_lora_a, get_adapter, set_adapter
from fedkit.errors import SchemaMismatchError


def tiny_model(*, seed: int = 0, r: int = 4, dtype: torch.dtype = torch.float32) -> PeftModel:
    torch.manual_seed(seed)
    base = nn.Sequential()
    base.add_module("hidden", nn.Linear(6, 8))
    base.add_module("head", nn.Linear(8, 3))
    model = get_peft_model(base, LoraConfig(r=r, target_modules=["hidden"], modules_to_save=["head"]))
    return model.to(dtype)


def test_adapter_holds_exactly_the_trainable_parameters() -> None:
    model = tiny_model()
    adapter = get_adapter(model)
    shapes = [tuple(p.shape) for p in model.parameters() if p.requires_grad]
    assert sorted(a.shape for a in adapter.values()) == sorted(shapes)
    assert all(a.dtype == np.float32 for a in adapter.values())


def test_names_and_order_do_not_depend_on_the_seed() -> None:
    assert list(get_adapter(tiny_model(seed=0))) == list(get_adapter(tiny_model(seed=1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_round_trip_changes_no_bit(dtype: torch.dtype) -> None:
    source, target = tiny_model(seed=0, dtype=dtype), tiny_model(seed=1, dtype=dtype)
    adapter = get_adapter(source)
    set_adapter(target, adapter)
    for name, array in get_adapter(target).items():
        np.testing.assert_array_equal(array, adapter[name])


def test_a_frozen_lora_a_is_part_of_the_adapter_and_is_not_trained() -> None:
    model = tiny_model()
    names = list(get_adapter(model))
    freeze_lora_a(model)
    assert list(get_adapter(model)) == names
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 3
    assert not any("lora_A" in name for name in trained)


def test_frozen_weights_are_left_alone() -> None:
    model = tiny_model(seed=1)
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    set_adapter(model, get_adapter(tiny_model(seed=0)))
    assert all(torch.equal(model.get_parameter(name), value) for name, value in frozen.items())


def test_arrays_are_copies_in_both_directions() -> None:
    model = tiny_model()
    adapter = get_adapter(model)
    before = {name: array.copy() for name, array in adapter.items()}
    set_adapter(model, adapter)
    for array in adapter.values():
        array += 1
    for name, array in get_adapter(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_set_adapter_takes_read_only_and_non_contiguous_arrays() -> None:
    model = tiny_model()
    odd = {name: np.asfortranarray(array) for name, array in get_adapter(model).items()}
    for array in odd.values():
        array.setflags(write=False)
    set_adapter(model, odd)


def test_another_rank_is_refused_with_a_hint_and_changes_nothing() -> None:
    model = tiny_model(r=4)
    before = get_adapter(model)
    with pytest.raises(SchemaMismatchError, match=r"lora_A.*LoRA rank"):
        set_adapter(model, get_adapter(tiny_model(r=2)))
    for name, array in get_adapter(model).items():
        np.testing.assert_array_equal(array, before[name])


def test_missing_and_unknown_arrays_are_refused_by_name() -> None:
    model = tiny_model()
    adapter = get_adapter(model)
    first = next(iter(adapter))
    with pytest.raises(SchemaMismatchError, match=first):
        set_adapter(model, {name: array for name, array in adapter.items() if name != first})
    with pytest.raises(SchemaMismatchError, match="surplus"):
        set_adapter(model, {**adapter, "surplus": np.zeros(1, np.float32)})
