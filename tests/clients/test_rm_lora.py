"""Laws of `fedkit.clients.rm_lora`."""

import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel

from fedkit.clients.adapters import get_adapter
from fedkit.clients.rm_lora import (
    RMLoraConfig,
    effective_rank,
    lora_pairs,
    mask_gradients,
    orthogonality_penalty,
    train_rm_lora,
)
from fedkit.errors import ConfigError
from tests.helpers.tiny_lora import R, TinyNet, kept, rm_config, tiny_batches, tiny_model


def trained(config: RMLoraConfig, *, seed: int = 0, epochs: int = 2) -> dict[str, np.ndarray]:
    model = tiny_model()
    train_rm_lora(model, tiny_batches(), config, learning_rate=1e-2, epochs=epochs, seed=seed)
    return get_adapter(model)


def with_gradients() -> PeftModel:
    model = tiny_model()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.ones_like(parameter)
    return model


def test_full_active_rank_without_penalty_is_plain_lora_bit_for_bit() -> None:
    model = tiny_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.0)
    model.train()
    torch.manual_seed(5)
    for _ in range(2):
        for batch in tiny_batches():
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()
    plain = get_adapter(model)
    for name, array in trained(rm_config(active_rank=R), seed=5).items():
        np.testing.assert_array_equal(array, plain[name])


@pytest.mark.parametrize("mask", ["paired", "independent"])
def test_same_seed_gives_the_same_adapter_and_another_seed_does_not(mask: str) -> None:
    config = rm_config(mask=mask, orth_reg_weight=0.1)
    first, again, other = trained(config, seed=3), trained(config, seed=3), trained(config, seed=4)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert any(not np.array_equal(first[name], other[name]) for name in first)


def test_training_leaves_the_callers_random_state_alone() -> None:
    torch.manual_seed(9)
    expected = torch.rand(3)
    model = tiny_model()
    torch.manual_seed(9)
    train_rm_lora(model, tiny_batches(), rm_config(), learning_rate=1e-2, seed=1)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("active_rank", [1, 2, R])
def test_mask_keeps_exactly_active_rank_rows_and_columns(active_rank: int) -> None:
    for mask in ("paired", "independent"):
        model = with_gradients()
        mask_gradients(model, active_rank, mask, torch.Generator().manual_seed(0))
        for _, a, b in lora_pairs(model):
            assert len(kept(a.grad)) == len(kept(b.grad.T)) == active_rank
            assert a.grad.sum() == active_rank * a.shape[1]
            assert b.grad.sum() == active_rank * b.shape[0]


def test_paired_mask_keeps_the_same_components_and_independent_draws_its_own() -> None:
    generator, differs = torch.Generator().manual_seed(0), []
    for _ in range(10):
        model = with_gradients()
        mask_gradients(model, 2, "paired", generator)
        assert all(kept(a.grad) == kept(b.grad.T) for _, a, b in lora_pairs(model))
        model = with_gradients()
        mask_gradients(model, 2, "independent", generator)
        differs += [kept(a.grad) != kept(b.grad.T) for _, a, b in lora_pairs(model)]
    assert any(differs)


def test_every_component_gets_its_turn() -> None:
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        model = with_gradients()
        mask_gradients(model, 2, "paired", generator)
        seen |= {(name, *kept(a.grad)) for name, a, _ in lora_pairs(model)}
    assert len(seen) == 2 * math.comb(R, 2)  # every subset, in both layers


def test_head_is_exempt_from_the_mask() -> None:
    model = with_gradients()
    mask_gradients(model, 1, "paired", torch.Generator().manual_seed(0))
    heads = [p.grad for name, p in model.named_parameters() if "head" in name and p.requires_grad]
    assert len(heads) == 2
    assert all((grad == 1).all() for grad in heads)


def test_first_step_moves_only_the_chosen_components() -> None:
    model = tiny_model(b_is_zero=False)
    before = [(a.detach().clone(), b.detach().clone()) for _, a, b in lora_pairs(model)]
    train_rm_lora(model, tiny_batches()[:1], rm_config(active_rank=1), learning_rate=1e-2, seed=0)
    for (a0, b0), (_, a, b) in zip(before, lora_pairs(model), strict=True):
        assert len(kept(a - a0)) == 1
        assert kept(a - a0) == kept((b - b0).T)


def test_momentum_moves_masked_rows_after_they_were_trained_once() -> None:
    model = tiny_model(b_is_zero=False)
    before = [b.detach().clone() for _, _, b in lora_pairs(model)]
    train_rm_lora(model, tiny_batches() * 8, rm_config(active_rank=1), learning_rate=1e-2, seed=0)
    assert all(len(kept((b - b0).T)) == R for b0, (_, _, b) in zip(before, lora_pairs(model), strict=True))


def test_penalty_equals_the_formula() -> None:
    model = tiny_model(b_is_zero=False)
    expected = []
    for _, a, b in lora_pairs(model):
        rows, columns = a.detach().numpy(), b.detach().numpy()
        expected.append(np.linalg.norm(rows @ rows.T - np.eye(R)))
        expected.append(np.linalg.norm(columns.T @ columns - np.eye(R)))
    assert orthogonality_penalty(model).item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_penalty_of_orthonormal_factors_is_zero_with_a_finite_gradient() -> None:
    model = tiny_model()
    with torch.no_grad():
        for _, a, b in lora_pairs(model):
            a.copy_(torch.eye(*a.shape))
            b.copy_(torch.eye(*b.shape))
    penalty = orthogonality_penalty(model)
    penalty.backward()
    assert penalty.item() == 0
    assert all(a.grad.isfinite().all() and b.grad.isfinite().all() for _, a, b in lora_pairs(model))


def test_penalty_raises_the_effective_rank() -> None:
    ranks = []
    for weight in (0.0, 1.0):
        model = tiny_model()
        config = rm_config(active_rank=R, orth_reg_weight=weight)
        metrics = train_rm_lora(model, tiny_batches(), config, learning_rate=1e-2, epochs=40, seed=0)
        assert metrics["effective-rank"] == effective_rank(model)
        ranks.append(metrics["effective-rank"])
    assert ranks[1] > ranks[0]


def test_effective_rank_counts_equal_singular_values() -> None:
    model = tiny_model()
    assert effective_rank(model) == 0
    for rank in range(1, R + 1):
        with torch.no_grad():
            for _, a, b in lora_pairs(model):
                a.copy_(torch.eye(*a.shape))
                b.copy_(torch.eye(*b.shape) * (torch.arange(R) < rank))
        assert effective_rank(model) == pytest.approx(rank, rel=1e-5)


def test_effective_rank_equals_that_of_the_dense_product() -> None:
    model = tiny_model(b_is_zero=False)
    expected = []
    for _, a, b in lora_pairs(model):
        values = np.linalg.svd((b @ a).detach().numpy(), compute_uv=False)[:R]
        shares = values / values.sum()
        expected.append(np.exp(-(shares * np.log(shares)).sum()))
    assert effective_rank(model) == pytest.approx(np.mean(expected), rel=1e-4)


def test_training_without_batches_is_refused() -> None:
    with pytest.raises(ConfigError, match="no batch"):
        train_rm_lora(tiny_model(), [], rm_config(), learning_rate=1e-2, seed=0)


@pytest.mark.parametrize(
    "changes",
    [
        {"r": 0},
        {"lora_alpha": 0},
        {"active_rank": 0},
        {"active_rank": R + 1},
        {"mask": "v1"},
        {"hold": "row"},
        {"penalty": "frd"},
        {"orth_reg_weight": -0.1},
        {"orth_reg_weight": float("nan")},
        {"target_modules": ()},
    ],
)
def test_values_that_can_never_work_are_refused_by_name(changes: dict[str, object]) -> None:
    name = "r " if "r" in changes else next(iter(changes))
    with pytest.raises(ConfigError, match=name):
        rm_config(**changes)


def test_the_head_is_trained_although_every_step_is_masked() -> None:
    model = tiny_model()
    before = [p.detach().clone() for name, p in model.named_parameters() if "head" in name and p.requires_grad]
    train_rm_lora(model, tiny_batches(), rm_config(active_rank=1), learning_rate=1e-2, seed=0)
    after = [p for name, p in model.named_parameters() if "head" in name and p.requires_grad]
    assert all((a != b).float().mean() > 0.5 for a, b in zip(before, after, strict=True))


def test_pythons_random_numbers_decide_nothing() -> None:
    adapters = []
    for seed in (1, 2):
        random.seed(seed)
        state = random.getstate()
        adapters.append(trained(rm_config()))
        assert random.getstate() == state
    assert all(np.array_equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


def test_an_adapter_that_was_saved_is_loaded_by_plain_peft(tmp_path: Path) -> None:
    model = tiny_model()
    train_rm_lora(model, tiny_batches(), rm_config(orth_reg_weight=0.1), learning_rate=1e-2, seed=0)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(TinyNet(), tmp_path)
    batch = tiny_batches()[0]
    assert model.eval()(**batch).loss.item() == loaded.eval()(**batch).loss.item()
    for name, array in get_adapter(model).items():
        np.testing.assert_array_equal(array, get_adapter(loaded)[name])
