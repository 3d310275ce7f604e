"""RM-LoRA in the Trainer of transformers does what the plain loop does, once per optimizer step."""

import numpy as np
import pytest
import torch
from transformers import TrainerCallback, TrainingArguments

from fedkit.clients.adapters import get_adapter
from fedkit.clients.masked_step import MaskedStep
from fedkit.clients.rm_lora import effective_rank, lora_pairs, orthogonality_penalty
from fedkit.clients.rm_lora_trainer import RMLoraTrainer
from fedkit.row_masks import RowDraw
from tests.helpers.tiny_lora import R, TinyNet, kept, rm_config, tiny_batches, tiny_model

EXAMPLES = [{"x": x, "labels": y} for b in tiny_batches() for x, y in zip(b["x"], b["labels"], strict=True)]


class Watch(TrainerCallback):
    """Notes gradients, and which components moved, of each optimizer step."""

    def __init__(self):
        self.grads, self.chosen, self.moved = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, **more):
        self.grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})
        self.chosen.append([kept(a.grad) for _, a, _ in lora_pairs(model)])
        self._before = [a.detach().clone() for _, a, _ in lora_pairs(model)]

    def on_step_end(self, args, state, control, model=None, **more):
        now = [a.detach() for _, a, _ in lora_pairs(model)]
        self.moved.append([kept(a - b) for a, b in zip(now, self._before, strict=True)])


@pytest.fixture(autouse=True)
def _no_dropout(monkeypatch):
    forward = TinyNet.forward
    monkeypatch.setattr(TinyNet, "forward", lambda self, x, labels: {"loss": forward(self, x, labels).loss})
    monkeypatch.setattr(torch.nn.Dropout, "forward", lambda self, x: x)


def trainer(folder, config, rows=None, model=None, **arguments):
    values = {
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "max_grad_norm": 0.0,
    }
    watch = Watch()
    made = RMLoraTrainer(
        model or tiny_model(b_is_zero=False),
        TrainingArguments(folder, **values | arguments),
        train_dataset=EXAMPLES,
        rm_lora=config,
        rows=rows,
    )
    made.add_callback(watch)  # after the mask
    return made, watch


def test_same_seed_same_adapter_and_the_rank_is_reported(tmp_path):
    found = []
    for seed in (3, 3, 4):
        made, _ = trainer(tmp_path, rm_config(orth_reg_weight=0.1), seed=seed)
        metrics = made.train().metrics
        found.append(get_adapter(made.model))
        assert metrics["effective-rank"] == effective_rank(made.model) > 0
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not np.array_equal(found[0][name], found[2][name]) for name in found[0])


def test_the_mask_is_drawn_once_per_optimizer_step_under_accumulation(tmp_path):
    config = rm_config(active_rank=2)
    made, watch = trainer(tmp_path, config, per_device_train_batch_size=4, gradient_accumulation_steps=3)
    made.train()
    assert len(watch.chosen) == 4  # 24 examples, 12 a step, 2 epochs
    for step, chosen in enumerate(watch.chosen):
        model = tiny_model()
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.grad = torch.ones_like(parameter)
        MaskedStep(model, 2, seed=made.args.seed).before(step)
        assert chosen == [kept(a.grad) for _, a, _ in lora_pairs(model)]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_penalty_is_added_once_per_optimizer_step_and_is_clipped_with_the_rest(tmp_path, accumulated):
    grads = []
    for weight in (0.0, 0.5):
        config = rm_config(active_rank=R, orth_reg_weight=weight)
        size = {"per_device_train_batch_size": 8 // accumulated, "gradient_accumulation_steps": accumulated}
        made, watch = trainer(tmp_path, config, max_steps=1, **size)
        made.train()
        grads.append(watch.grads[0])
    model = tiny_model(b_is_zero=False)
    (0.5 * orthogonality_penalty(model)).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            torch.testing.assert_close(grads[1][name] - grads[0][name], own, rtol=1e-4, atol=1e-5)
    made, watch = trainer(tmp_path, config, max_steps=1, max_grad_norm=0.01)
    made.train()
    assert sum(float(g.square().sum()) for g in watch.grads[0].values()) == pytest.approx(1e-4, rel=1e-3)


def test_masks_come_after_clipping(tmp_path):
    norms = []
    for active in (1, R):
        made, watch = trainer(tmp_path, rm_config(active_rank=active), max_steps=1, max_grad_norm=0.01)
        made.train()
        norms.append(sum(float(g.square().sum()) for g in watch.grads[0].values()) ** 0.5)
    assert norms[0] < norms[1] == pytest.approx(0.01, rel=1e-3)  # not clipped again to 0.01


@pytest.mark.parametrize("hold", ["gradient", "update"])
def test_strict_means_that_idle_rows_do_not_move_under_weight_decay(tmp_path, hold):
    made, watch = trainer(tmp_path, rm_config(hold=hold), weight_decay=0.1)
    made.train()
    assert (watch.moved == watch.chosen) == (hold == "update")


def test_rows_of_the_server_alone_move(tmp_path):
    model, draw = tiny_model(b_is_zero=False), RowDraw(1, 9)
    before = get_adapter(model)
    made, watch = trainer(tmp_path, rm_config(active_rank=R), draw, model, weight_decay=0.1)
    made.train()
    assert all(moved == watch.chosen[0] for moved in watch.moved)
    for name, array in get_adapter(model).items():
        if "lora_A" in name:
            assert kept(torch.from_numpy(array - before[name])) == draw.rows(name, R).tolist()


def test_a_run_taken_up_again_goes_on_with_the_same_masks(tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 3, "max_steps": 6}
    whole, watched = trainer(tmp_path / "whole", rm_config(), **arguments)
    whole.train()
    again, watch = trainer(tmp_path / "whole", rm_config(), **arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert watch.chosen == watched.chosen[3:]
    for name, array in get_adapter(whole.model).items():
        np.testing.assert_allclose(get_adapter(again.model)[name], array, rtol=1e-5, atol=1e-6)


def test_the_penalty_is_of_the_model_that_is_trained_also_if_model_init_makes_it(tmp_path):
    made = RMLoraTrainer(
        model_init=lambda: tiny_model(b_is_zero=False),
        args=TrainingArguments(tmp_path, learning_rate=5e-2, num_train_epochs=20, report_to=[], use_cpu=True),
        train_dataset=EXAMPLES,
        rm_lora=rm_config(active_rank=R, orth_reg_weight=100.0),
    )
    for _ in range(2):
        before = float(orthogonality_penalty(made.call_model_init()))
        made.train()
        assert float(orthogonality_penalty(made.model)) < before / 2
