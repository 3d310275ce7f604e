"""Slots of a PEFT model: each is trained as if it were alone, and one at a time is in the model."""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from peft import LoraConfig, PeftModel, get_peft_model

from fedkit.aggregation.evidence import FEATURES, features_from_text
from fedkit.aggregation.slots import join_slots, split_slots
from fedkit.clients.adapters import get_adapter, set_adapter
from fedkit.clients.features import Features
from fedkit.clients.slots import train_slots
from fedkit.codec.wire import Codec
from fedkit.errors import SchemaMismatchError
from fedkit.message import Instructions, write_instructions
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


def asking(wanted: bool) -> Message:
    """What a server sends that tells slots apart by features, or does not."""
    config = ConfigRecord()
    write_instructions(config, Instructions("tac", 1, Codec(), b"", {FEATURES: True} if wanted else {}))
    content = RecordDict({"config": config, "arrays": ArrayRecord()})
    return Message(content, dst_node_id=1, message_type="train")


def test_features_are_the_mean_of_what_the_head_is_given() -> None:
    model, features, content = tiny_model(), Features(asking(True)), RecordDict()
    given: list[torch.Tensor] = []

    def seeing(model: PeftModel, batches: slice) -> None:
        model.eval()
        with torch.no_grad():
            for batch in tiny_batches()[batches]:
                hidden = model.base_model.model.hidden(batch["x"]).relu()
                given.append(model.base_model.model.middle(hidden).relu())
                model(**batch)

    trainings = [partial(seeing, batches=slice(0, 1)), partial(seeing, batches=slice(1, 3))]
    train_slots(model, get_adapter(model), trainings, features)
    features.write(content)
    one, other = features_from_text(content[FEATURES]["means"], 2)  # type: ignore[index]
    np.testing.assert_allclose(one[0, :8], given[0].mean(0), atol=1e-3)
    np.testing.assert_allclose(other[0, :8], torch.cat(given[1:]).mean(0), atol=1e-3)
    assert not any(module._forward_pre_hooks for module in model.modules()), "nothing is left behind"


def test_who_is_not_asked_says_nothing() -> None:
    for message in (asking(False), Message(RecordDict(), dst_node_id=1, message_type="train")):
        model, features, content = tiny_model(), Features(message), RecordDict()
        train_slots(model, get_adapter(model), [partial(train, rate=0.1)], features)
        features.write(content)
        assert not content


def test_numbers_of_tokens_are_no_features():
    """With LoRA on the embedding, and no head that is saved, the next layer is watched; texts of any length."""
    net = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 3))
    model = get_peft_model(net, LoraConfig(r=2, target_modules=["0", "1"]))
    features, content = Features(asking(True)), RecordDict()
    with features.watching(model):
        for length in (5, 7):
            model(torch.full((2, length), 8))
    features.write(content)
    (row,) = features_from_text(content[FEATURES]["means"], 1)
    np.testing.assert_allclose(row[0, :4], net[0].weight[8].detach().numpy(), atol=1e-2)
