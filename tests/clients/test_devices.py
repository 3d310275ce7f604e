"""What training does is the same on every device: ``pytest tests/clients -k cuda`` where there is a GPU."""

import numpy as np
import pytest
import torch

from fedkit.clients.adapters import get_adapter, set_adapter
from fedkit.clients.frozen_base import frozen_linears
from fedkit.clients.orthogonality import effective_rank, lora_pairs, orthogonality_penalty
from fedkit.clients.profiles import PROFILES, Profile
from fedkit.clients.rm_lora import train_rm_lora
from fedkit.clients.rm_lora_trainer import RMLoraTrainer
from fedkit.row_masks import RowDraw
from tests.helpers.tiny_lora import R, TinyNet, kept, rm_config, tiny_batches, tiny_model


@pytest.fixture(autouse=True)
def _no_dropout(monkeypatch):
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)  # it draws other numbers on each device


def exact(device, **changes):
    return Profile(device=device, **changes)


def trained(profile, config=None, *, rows=None, batches=None, epochs=2, model=None):
    model = profile.prepare(model or tiny_model(b_is_zero=False))
    metrics = train_rm_lora(
        model,
        batches or tiny_batches(),
        config or rm_config(orth_reg_weight=0.1),
        learning_rate=1e-2,
        epochs=epochs,
        seed=0,
        profile=profile,
        rows=rows,
    )
    return model, metrics


def moved(model):
    """How far training went, as one vector."""
    before, after = get_adapter(tiny_model(b_is_zero=False)), get_adapter(model)
    assert all(array.dtype == np.float32 for array in after.values())
    return np.concatenate([(after[name] - before[name]).ravel() for name in before])


def distance(model, reference):
    return np.linalg.norm(moved(model) - moved(reference)) / np.linalg.norm(moved(reference))


@pytest.mark.parametrize("hold", ["gradient", "update"])
@pytest.mark.parametrize("mask", ["paired", "independent"])
def test_float32_training_is_that_of_the_cpu(device, hold, mask):
    config = rm_config(hold=hold, mask=mask, orth_reg_weight=0.1)
    model, metrics = trained(exact(device), config)
    reference, wanted = trained(exact("cpu"), config)
    assert next(model.parameters()).device.type == device
    assert distance(model, reference) < 0.01
    assert metrics == pytest.approx(wanted, rel=1e-3)


def test_the_profile_of_the_device_learns_what_float32_learns(device):
    profile = PROFILES["gpu" if device == "cuda" else "cpu"]
    model, metrics = trained(profile, rm_config(active_rank=R), epochs=20)
    reference, wanted = trained(exact("cpu"), rm_config(active_rank=R), epochs=20)
    assert metrics["train-loss"] == pytest.approx(wanted["train-loss"], rel=0.05)
    assert distance(model, reference) < 0.3


def test_an_adapter_comes_back_from_the_device_bit_for_bit(device):
    profile = PROFILES["gpu" if device == "cuda" else "cpu"]
    model, given = profile.prepare(tiny_model()), get_adapter(tiny_model(b_is_zero=False))
    set_adapter(model, given)
    found = get_adapter(model)
    assert all(found[name].tobytes() == given[name].tobytes() for name in given)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_a_batch_in_pieces_has_the_gradient_of_the_whole(device):
    whole, _ = trained(exact(device), epochs=1)
    for size in (3, 5, 8):  # of batches of 8
        model, _ = trained(exact(device, micro_batch=size), epochs=1)
        assert distance(model, whole) < 0.01


def test_pieces_are_on_the_device_and_their_shares_add_up(device):
    batch = {"x": torch.arange(20.0).reshape(10, 2), "labels": torch.arange(10)}
    pieces = list(exact(device, micro_batch=4).pieces(batch))
    assert [share for share, _ in pieces] == pytest.approx([0.4, 0.4, 0.2])
    assert {value.device.type for _, piece in pieces for value in piece.values()} == {device}
    for name, value in batch.items():
        assert torch.equal(torch.cat([piece[name].cpu() for _, piece in pieces]), value)


def test_rows_that_the_server_chose_are_those_that_move(device):
    rows = RowDraw(1, 7, "paired")
    model, _ = trained(exact(device), rows=rows)
    before = [(a.detach(), b.detach()) for _, a, b in lora_pairs(tiny_model(b_is_zero=False))]
    for (layer, a, b), (a0, b0) in zip(lora_pairs(model), before, strict=True):
        assert kept(a.cpu() - a0) == rows.rows(f"{layer}.lora_A.weight", R).tolist()
        assert kept((b.cpu() - b0).T) == rows.rows(f"{layer}.lora_B.weight", R).tolist()


@pytest.mark.parametrize("penalty", ["norm", "cosine"])
def test_penalty_and_rank_are_those_of_the_cpu(device, penalty):
    model, reference = tiny_model(b_is_zero=False).to(device), tiny_model(b_is_zero=False)
    assert float(orthogonality_penalty(model, penalty)) == pytest.approx(
        float(orthogonality_penalty(reference, penalty)), rel=1e-4
    )
    assert effective_rank(model) == pytest.approx(effective_rank(reference), rel=1e-4)


def test_the_frozen_layers_of_a_gpu_are_bfloat16_and_gradients_pass_through(device):
    profile = PROFILES["gpu"] if device == "cuda" else Profile(bfloat16=True)
    model = profile.prepare(tiny_model(b_is_zero=False))
    assert {layer.weight.dtype for _, layer in frozen_linears(model)} == {torch.bfloat16}
    ((_, piece), *_) = profile.pieces(tiny_batches()[0])
    with profile.autocast():
        loss = model(**piece).loss
    loss.backward()
    assert all(a.grad.count_nonzero() and b.grad.count_nonzero() for _, a, b in lora_pairs(model))


def test_the_trainer_of_transformers_trains_there_too(device, tmp_path, monkeypatch):
    from transformers import TrainingArguments

    forward = TinyNet.forward
    monkeypatch.setattr(TinyNet, "forward", lambda self, x, labels: {"loss": forward(self, x, labels).loss})
    examples = [{"x": x, "labels": y} for b in tiny_batches() for x, y in zip(b["x"], b["labels"], strict=True)]
    arguments = TrainingArguments(
        tmp_path,
        per_device_train_batch_size=8,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        use_cpu=device == "cpu",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    model, before = tiny_model(b_is_zero=False), get_adapter(tiny_model(b_is_zero=False))
    trainer = RMLoraTrainer(model, arguments, train_dataset=examples, rm_lora=rm_config(orth_reg_weight=0.1))
    assert trainer.train().metrics["effective-rank"] > 0
    assert next(model.parameters()).device.type == device
    assert any(not np.array_equal(array, before[name]) for name, array in get_adapter(model).items())
