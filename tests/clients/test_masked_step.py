"""Laws of `fedkit.clients.masked_step`: what a step may change, and what not."""

import copy

import pytest
import torch

from fedkit.clients.adapters import get_adapter, set_adapter
from fedkit.clients.masked_step import BLOCK, MaskedStep
from fedkit.clients.rm_lora import lora_pairs, train_rm_lora
from fedkit.errors import ConfigError
from fedkit.row_masks import RowDraw
from tests.helpers.tiny_lora import R, kept, rm_config, tiny_batches, tiny_model

MAKERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "AMSGrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
}


def values_of(model, optimizer):
    """Return, by factor and name, parameter and moments, with the components along the first axis."""
    found = {}
    for layer, a, b in lora_pairs(model):
        for factor, parameter in (("A", a), ("B", b)):
            tensors = {"": parameter.detach(), **optimizer.state.get(parameter, {})}
            for key, tensor in tensors.items():
                if tensor.ndim:
                    found[layer, factor, key] = (tensor if factor == "A" else tensor.T).clone()
    return found


def steps(hold, make, mask="paired", count=8):
    """Train step by step; yield which components moved: ((layer, factor, key), indices)."""
    model = tiny_model(b_is_zero=False)
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    masked = MaskedStep(model, 2, mask, hold)
    for step, batch in zip(range(count), tiny_batches() * count, strict=False):
        before = values_of(model, optimizer)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        masked.before(step, optimizer)
        chosen = {
            (layer, factor): kept(p.grad if factor == "A" else p.grad.T)
            for layer, a, b in lora_pairs(model)
            for factor, p in (("A", a), ("B", b))
        }
        optimizer.step()
        masked.after(optimizer)
        for place, now in values_of(model, optimizer).items():
            yield chosen[place[:2]], kept(now - before.get(place, torch.zeros_like(now))), place


@pytest.mark.parametrize("mask", ["paired", "independent"])
@pytest.mark.parametrize("name", MAKERS)
def test_strict_neither_rows_nor_moments_change_while_they_rest(name, mask):
    seen = list(steps("update", MAKERS[name], mask))
    assert all(moved == chosen for chosen, moved, _ in seen)
    assert {len(chosen) for chosen, _, _ in seen} == {2}
    assert name == "SGD" or any("sq" in key for _, _, (_, _, key) in seen)


def test_momentum_leaks_through_a_mask_of_gradients_and_not_through_the_strict_form():
    def on_idle(hold):
        return sum(
            len(set(moved) - set(chosen))
            for chosen, moved, (_, _, key) in steps(hold, MAKERS["AdamW"])
            if key == ""
        )

    assert on_idle("gradient") > 0
    assert on_idle("update") == 0


def test_the_first_step_is_the_same_in_both_forms():
    first = {}
    for hold in ("gradient", "update"):
        model = tiny_model(b_is_zero=False)
        train_rm_lora(model, tiny_batches()[:1], rm_config(hold=hold), learning_rate=1e-2, seed=3)
        first[hold] = get_adapter(model)
    assert all((first["gradient"][name] == first["update"][name]).all() for name in first["update"])


def test_the_strict_form_equals_an_adam_written_by_hand():
    """Row by row: a row that rests is skipped; the number of steps is the tensor's."""
    model = tiny_model(b_is_zero=False)
    params = [a for _, a, _ in lora_pairs(model)]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    masked = MaskedStep(model, 2, "paired", "update")
    rows = [p.detach().double().clone() for p in params]
    first, second = ([torch.zeros_like(row) for row in rows] for _ in range(2))
    for t, batch in enumerate(tiny_batches() * 3, start=1):
        optimizer.zero_grad()
        model(**batch).loss.backward()
        masked.before(t, optimizer)
        for row, m, v, p in zip(rows, first, second, params, strict=True):
            for i in kept(p.grad):
                g = p.grad[i].double()
                m[i] = 0.9 * m[i] + 0.1 * g
                v[i] = 0.999 * v[i] + 0.001 * g * g
                row[i] *= 1 - 0.01 * 0.1
                row[i] -= 0.01 * (m[i] / (1 - 0.9**t)) / ((v[i] / (1 - 0.999**t)).sqrt() + 1e-8)
        optimizer.step()
        masked.after(optimizer)
    for row, p in zip(rows, params, strict=True):
        torch.testing.assert_close(p.detach().double(), row, rtol=1e-4, atol=1e-5)


def test_fixed_rows_alone_move_in_all_steps_and_are_those_that_the_server_works_out():
    model, draw = tiny_model(b_is_zero=False), RowDraw(2, 77)
    before = get_adapter(model)
    train_rm_lora(model, tiny_batches(), rm_config(active_rank=R), learning_rate=1e-2, seed=0, epochs=3, rows=draw)
    after, part = get_adapter(model), draw.submodel(before)
    assert any(len(kept(torch.from_numpy(after[name] - before[name]))) == 2 for name in after)
    for name, array in after.items():
        changed = array != before[name]
        for axis, indices in enumerate(part.index_sets[name]):
            assert sorted(set(changed.nonzero()[axis].tolist())) == indices.tolist()


def test_all_rows_fixed_is_plain_lora_bit_for_bit():
    plain, ours = tiny_model(), tiny_model()
    set_adapter(ours, get_adapter(plain))
    for model, rows in ((plain, None), (ours, RowDraw(R, 5))):
        train_rm_lora(model, tiny_batches(), rm_config(active_rank=R), learning_rate=1e-2, seed=0, rows=rows)
    expected = get_adapter(plain)
    assert all((array == expected[name]).all() for name, array in get_adapter(ours).items())


def test_a_frozen_factor_is_left_alone():
    model = tiny_model(b_is_zero=False)
    for _, a, _ in lora_pairs(model):
        a.requires_grad_(False)
    before = copy.deepcopy(get_adapter(model))
    train_rm_lora(model, tiny_batches(), rm_config(hold="update"), learning_rate=1e-2, seed=0)
    after = get_adapter(model)
    assert all((after[name] == before[name]).all() for name in after if "lora_A" in name)


def test_what_cannot_be_held_is_refused():
    class Factored(torch.optim.Optimizer):
        def step(self, closure=None):
            raise NotImplementedError

    model = tiny_model()
    model(**tiny_batches()[0]).loss.backward()
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = Factored(params, {})
    for p in params:
        optimizer.state[p] = {"row": torch.zeros(len(p))}
    masked = MaskedStep(model, 2, hold="update")
    with pytest.raises(ConfigError, match="Factored has 'row'"):
        masked.before(0, optimizer)
    with pytest.raises(ConfigError, match="tell `before` which"):
        masked.before(0)
    with pytest.raises(ConfigError, match="nothing to mask"):
        MaskedStep(torch.nn.Linear(2, 2), 1)


def test_a_factor_that_is_trained_later_than_others_begins_with_moments_of_zero_where_it_rests():
    model = tiny_model(b_is_zero=False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    masked, late = MaskedStep(model, 2, hold="update"), list(lora_pairs(model))[1][1:]
    for number, batch in enumerate(tiny_batches()):
        before = values_of(model, optimizer)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        if number == 0:
            for parameter in late:
                parameter.grad = None
        masked.before(number, optimizer)
        optimizer.step()
        masked.after(optimizer)
        moved = {
            place: kept(now - before.get(place, torch.zeros_like(now)))
            for place, now in values_of(model, optimizer).items()
        }
        assert {len(indices) for indices in moved.values()} == ({2, 0} if number == 0 else {2})
    assert any(key == "exp_avg" for *_, key in moved)


def test_the_seed_and_the_number_of_a_step_alone_decide_what_it_trains():
    model, chosen = tiny_model(), {}
    for seed in (0, 1):
        masked = MaskedStep(model, 2, seed=seed)
        for step in (3, BLOCK + 3, 0, 3, 5 * BLOCK, BLOCK + 3):
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.grad = torch.ones_like(parameter)
            masked.before(step)
            now = [kept(a.grad) for _, a, _ in lora_pairs(model)]
            assert chosen.setdefault((seed, step), now) == now
    assert len({str(components) for components in chosen.values()}) > 4


def test_what_an_optimizer_begins_with_is_left_to_it_unless_it_is_a_mean_of_gradients():
    model = tiny_model(b_is_zero=False)
    optimizer = torch.optim.Rprop([p for _, *pair in lora_pairs(model) for p in pair], lr=1e-3)
    masked = MaskedStep(model, 1, hold="update")
    model(**tiny_batches()[0]).loss.backward()
    masked.before(0, optimizer)
    optimizer.step()
    masked.after(optimizer)
    assert all((state["step_size"] == 1e-3).all() for state in optimizer.state.values())
