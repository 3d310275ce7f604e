"""Pitfalls of RM-LoRA's regularizer, and its scale-free form."""

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from fedkit.clients.orthogonality import Orthogonality, lora_pairs, orthogonality_penalty
from fedkit.errors import ConfigError
from tests.helpers.tiny_lora import R, TinyNet, tiny_model


def orthonormal(model, scale=1.0):
    with torch.no_grad():
        for _, a, b in lora_pairs(model):
            a.copy_(scale * torch.linalg.qr(torch.randn(a.shape[1], R)).Q.T)
            b.copy_(scale * torch.linalg.qr(torch.randn(b.shape[0], R)).Q)
    return model


def test_zero_b_is_a_saddle_its_gradient_is_exactly_zero_and_that_of_a_is_not():
    model = tiny_model()
    penalty = orthogonality_penalty(model)
    penalty.backward()
    measured = [np.linalg.norm((a @ a.T - torch.eye(R)).detach()) for _, a, _ in lora_pairs(model)]
    assert penalty.item() == pytest.approx((sum(measured) + 2 * np.sqrt(R)) / 4, rel=1e-5)
    assert all((b.grad == 0).all() for _, _, b in lora_pairs(model))
    assert all((a.grad != 0).any() for _, a, _ in lora_pairs(model))


@pytest.mark.parametrize("penalty", ["norm", "cosine"])
def test_gradients_are_finite_everywhere(penalty):
    for model in (tiny_model(), orthonormal(tiny_model()), tiny_model(b_is_zero=False)):
        with torch.no_grad():
            next(lora_pairs(model))[1][0] = 0  # a zero row
        orthogonality_penalty(model, penalty).backward()
        Orthogonality(model, penalty).add_gradient(1.0)
        assert all(p.grad.isfinite().all() for _, *pair in lora_pairs(model) for p in pair)


@pytest.mark.parametrize("penalty", ["norm", "cosine"])
@pytest.mark.parametrize(
    "make", [tiny_model, lambda: orthonormal(tiny_model()), lambda: tiny_model(b_is_zero=False)]
)
def test_the_gradient_by_hand_is_that_of_the_penalty_and_is_added(make, penalty):
    by_autograd, by_hand = make(), make()
    by_hand.load_state_dict(by_autograd.state_dict())
    with torch.no_grad():
        for model in (by_autograd, by_hand):
            next(lora_pairs(model))[1][0] = 0  # a zero row
    pairs = list(zip(lora_pairs(by_autograd), lora_pairs(by_hand), strict=True))
    for (_, a, _), (_, same, _) in pairs:
        a.grad = torch.ones_like(a)  # of the task; B's is none yet
        same.grad = torch.ones_like(a)
    pairs[0][1][1].requires_grad_(False)  # a frozen factor counts, but has no gradient
    (0.3 * orthogonality_penalty(by_autograd, penalty)).backward()
    Orthogonality(by_hand, penalty).add_gradient(0.3)
    assert (pairs[0][1][1].grad == 1).all()
    for (_, *expected), (_, *found) in pairs:
        for p, q in zip(expected, found, strict=True):
            if q.requires_grad:
                torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("penalty", ["norm", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_of_half_precision_have_the_gradient_of_float32_ones(penalty, dtype):
    half, single = (tiny_model(b_is_zero=False) for _ in range(2))
    with torch.no_grad():
        for (_, *low), (_, *high) in zip(lora_pairs(half), lora_pairs(single), strict=True):
            low[1].mul_(1e-3)  # B, after a few steps from zero
            for p, q in zip(low, high, strict=True):
                p.data = p.to(dtype)
                q.copy_(p)
    for model in (half, single):
        Orthogonality(model, penalty).add_gradient(1.0)
    for (_, *low), (_, *high) in zip(lora_pairs(half), lora_pairs(single), strict=True):
        for p, q in zip(low, high, strict=True):
            torch.testing.assert_close(p.grad, q.grad.to(dtype))
    assert orthogonality_penalty(half, penalty).isfinite()


def test_the_norm_fixes_the_scale_and_the_cosine_does_not():
    for scale in (1.0, 3.0):
        model = orthonormal(tiny_model(), scale)
        for _, a, b in lora_pairs(model):  # all singular values of the update are α/r · scale²
            values = torch.linalg.svdvals((b @ a).detach())[:R]
            torch.testing.assert_close(values, torch.full((R,), scale**2), rtol=1e-4, atol=1e-4)
        norm, cosine = (float(orthogonality_penalty(model, kind)) for kind in ("norm", "cosine"))
        assert norm == pytest.approx((scale**2 - 1) * np.sqrt(R), abs=1e-5, rel=1e-5)
        assert cosine == pytest.approx(0, abs=1e-6)


def test_the_cosine_equals_the_formula():
    model, expected = tiny_model(b_is_zero=False), []
    for _, a, b in lora_pairs(model):
        for rows in (a.detach().numpy(), b.detach().numpy().T):
            total = 0.0
            for i in range(R):
                for j in range(R):
                    if i != j:
                        total += abs(rows[i] @ rows[j]) / np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
            expected.append(total / (R * R - R))
    assert orthogonality_penalty(model, "cosine").item() == pytest.approx(np.mean(expected), rel=1e-5)


def test_one_row_has_no_cosine():
    model = get_peft_model(TinyNet(), LoraConfig(r=1, target_modules=["hidden"]))
    assert orthogonality_penalty(model, "cosine").item() == 0


@pytest.mark.parametrize("penalty", ["norm", "cosine"])
@pytest.mark.parametrize("ranks", [{}, {"1": 2}])
def test_factors_measured_together_count_as_those_measured_one_by_one(penalty, ranks):
    torch.manual_seed(0)
    net = torch.nn.Sequential(*[torch.nn.Linear(6, 6) for _ in range(3)], torch.nn.Linear(6, 9))
    config = LoraConfig(r=R, target_modules=["0", "1", "2", "3"], init_lora_weights=False, rank_pattern=ranks)
    model = get_peft_model(net, config)
    together = Orthogonality(model, penalty)()
    together.backward()
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    alone = [orthogonality_penalty(layer, penalty).item() for layer in layers]
    assert len(alone) == 4
    expected = [p.grad for _, *pair in lora_pairs(model) for p in pair]
    model.zero_grad()
    Orthogonality(model, penalty).add_gradient(1.0)
    found = [p.grad for _, *pair in lora_pairs(model) for p in pair]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert together.item() == pytest.approx(np.mean(alone), rel=1e-5)


def test_a_model_without_factors_is_refused():
    with pytest.raises(ConfigError, match="nothing to regularize"):
        orthogonality_penalty(TinyNet())
