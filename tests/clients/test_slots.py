"""Slots of a PEFT model: each is trained as if it were alone, and one at a time is in the model."""

from functools import partial

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedkit.aggregation.slots import join_slots, split_slots
from fedkit.clients.adapters import get_adapter, set_adapter
from fedkit.clients.slots import train_slots
from fedkit.errors import SchemaMismatchError
from tests.helpers.tiny_lora import tiny_batches, tiny_model


def train(model: PeftModel, rate: float) -> float:
    model.eval()  # no dropout: the same each time
    loss = model(**tiny_batches()[0]).loss
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return float(loss)


def test_each_slot_is_trained_from_its_own_start_as_if_it_were_alone() -> None:
    model = tiny_model(b_is_zero=False)
    first = get_adapter(model)
    second = {name: 2 * array for name, array in first.items()}
    trained, losses = train_slots(model, join_slots([first, second]), [partial(train, rate=r) for r in (0.1, 0.5)])
    assert len(losses) == 2
    for start, rate, found in zip([first, second], [0.1, 0.5], split_slots(trained, 2), strict=True):
        set_adapter(model, start)
        train(model, rate)
        model.zero_grad()
        for name, array in get_adapter(model).items():
            np.testing.assert_array_equal(found[name], array)


def test_the_model_never_holds_more_than_one_adapter_and_no_gradient_is_left() -> None:
    model = tiny_model()
    size = sum(parameter.numel() for parameter in model.parameters())

    def watched(model: PeftModel) -> list[str]:
        assert sum(parameter.numel() for parameter in model.parameters()) == size
        assert all(parameter.grad is None for parameter in model.parameters())
        train(model, 0.1)
        return list(model.peft_config)

    _, seen = train_slots(model, join_slots([get_adapter(model)]), [watched] * 3)
    assert seen == [["default"]] * 3
    assert all(parameter.grad is None for parameter in model.parameters())


def test_slots_beyond_those_received_start_from_the_first() -> None:
    model = tiny_model()
    trained, _ = train_slots(model, get_adapter(model), [partial(train, rate=0.1)] * 2)
    one, other = split_slots(trained, 2)
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_an_adapter_of_another_rank_is_refused() -> None:
    model = tiny_model()
    other = {name: np.zeros((9, *array.shape[1:]), np.float32) for name, array in get_adapter(model).items()}
    with pytest.raises(SchemaMismatchError):
        train_slots(model, other, [partial(train, rate=0.1)])
