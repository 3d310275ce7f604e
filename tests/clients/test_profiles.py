"""Profiles: what a node's config means, what int8 does to a model, and memory that is not exceeded."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from flwr.app import Context, RecordDict
from transformers import BertConfig, BertForSequenceClassification

from fedkit.clients.adapters import get_adapter
from fedkit.clients.frozen_base import frozen_linears
from fedkit.clients.orthogonality import lora_pairs
from fedkit.clients.profiles import PROFILES, Profile, described
from fedkit.clients.resident import MB, check_budget, resident_bytes, weight_bytes
from fedkit.clients.rm_lora import train_rm_lora
from fedkit.errors import ConfigError, MemoryBudgetError
from tests.helpers.tiny_lora import rm_config, tiny_batches, tiny_model


def node(**config):
    return Context(run_id=1, node_id=1, node_config=config, state=RecordDict(), run_config={})


def test_a_node_config_names_the_profile_and_sets_what_it_likes(monkeypatch):
    assert Profile.of(node(profile="mobile")) == PROFILES["mobile"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Profile.of(node()) == PROFILES["cpu"]
    config = {"profile": "mobile", "threads": 2, "micro-batch": 8, "memory-mb": 900}
    assert Profile.of(node(**config)) == Profile(
        name="mobile", int8=True, checkpointing=True, threads=2, micro_batch=8, memory=900 * MB
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"profile": "moblie"}, "unknown profile 'moblie'. Did you mean 'mobile'"),
        ({"threads": "two"}, "'threads': expected int, got str 'two'"),
        ({"memory-mb": 0}, "memory of at least 1, got 0"),
    ],
)
def test_a_node_config_that_makes_no_sense_is_refused_by_name(config, message):
    with pytest.raises(ConfigError, match=message):
        Profile.of(node(**config))


def test_a_client_says_what_it_has():
    said = described(node(profile="mobile", **{"memory-mb": 500}))
    assert said["profile"] == "mobile"
    assert said["cores"] >= 1
    assert said["memory-mb"] == 500
    assert described(node())["memory-mb"] > 500


def test_saying_so_does_not_import_torch():
    code = "import sys, fedkit.clients.profiles as p; from flwr.app import Context, RecordDict\n"
    code += "p.described(Context(1, 1, {}, RecordDict(), {})); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_gpu_without_cuda_is_refused_with_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    with pytest.raises(ConfigError, match="profile='cpu'"):
        PROFILES["gpu"].prepare(tiny_model())


# ---- int8 ----------------------------------------------------------------------------------------


def encoder():
    """Return a small BERT with LoRA, whose lowest layer's gradient passes through all others."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], modules_to_save=["classifier"])
    model = get_peft_model(BertForSequenceClassification(config), lora)
    for _, _, b in lora_pairs(model):
        torch.nn.init.normal_(b, std=0.1)
    return model


def sentences(count=8):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (count, 6), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids[:, 0] % 2}


@pytest.fixture
def mobile():
    pytest.importorskip("torchao", reason="the extra `mobile` is not installed")
    return Profile(name="mobile", int8=True, checkpointing=True, micro_batch=4)


def test_frozen_layers_are_int8_within_half_a_step_and_the_rest_is_as_it_was(mobile):
    before = {name: p.detach().clone() for name, p in encoder().named_parameters()}
    model = mobile.prepare(encoder())
    names = [name for name, _ in frozen_linears(model)]
    assert len(names) == 3 * 6 + 1  # and the pooler
    for name, layer in frozen_linears(model):
        weight = before[f"{name}.weight"]
        step = weight.abs().amax(1, keepdim=True) / 127
        assert layer.weight.qdata.dtype == torch.int8
        assert ((layer.weight.dequantize() - weight).abs() <= 0.51 * step).all()
    for name, parameter in model.named_parameters():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(parameter, before[name])


def gradients(model, profile):
    model.eval()  # no dropout
    for _, piece in profile.pieces(sentences(4)):
        model(**piece).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_reach_the_lowest_layer_through_int8(mobile):
    ours, wanted = gradients(mobile.prepare(encoder()), mobile), gradients(encoder(), PROFILES["cpu"])
    assert list(ours) == list(wanted)
    assert "layer.0" in next(iter(ours))
    for name, grad in wanted.items():
        assert (ours[name] - grad).norm() < 0.1 * grad.norm(), name


def test_a_mobile_client_learns_and_its_adapter_is_float32(mobile):
    model = mobile.prepare(encoder())
    config = rm_config(active_rank=4, target_modules=("query", "value"))
    losses = [
        train_rm_lora(model, [sentences()], config, learning_rate=3e-2, seed=k, profile=mobile)["train-loss"]
        for k in range(20)
    ]
    assert losses[-1] < 0.5 * losses[0]
    assert {array.dtype for array in get_adapter(model).values()} == {np.dtype(np.float32)}
    assert list(get_adapter(model)) == list(get_adapter(encoder()))


def test_activations_are_computed_again_and_the_gradient_stays_the_same():
    kept, again = Profile(), Profile(checkpointing=True)
    config = rm_config(active_rank=4, target_modules=("query", "value"))
    found = []
    for profile in (kept, again):
        model = profile.prepare(encoder())
        train_rm_lora(model, [sentences()], config, learning_rate=1e-2, seed=0, profile=profile)
        found.append(get_adapter(model))
    assert any(getattr(part, "gradient_checkpointing", False) for part in model.modules())
    for name, array in found[0].items():
        np.testing.assert_allclose(found[1][name], array, atol=1e-6)


def test_without_torchao_a_mobile_client_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ConfigError, match=r"fedkit\[mobile\]"):
        Profile(int8=True).prepare(tiny_model())


# ---- memory --------------------------------------------------------------------------------------


def test_the_budget_is_held_against_what_is_resident():
    held = resident_bytes()
    ballast = np.ones(100 * MB, np.uint8)
    assert 90 * MB < resident_bytes() - held < 150 * MB
    del ballast
    check_budget(None, needed=10**18)
    check_budget(resident_bytes() + 200 * MB, needed=50 * MB)
    with pytest.raises(MemoryBudgetError, match=r"expected at most .* MB resident, got .*needs 300 MB more"):
        check_budget(resident_bytes() + 200 * MB, needed=300 * MB)


def test_a_step_over_the_budget_ends_training():
    profile, ballast = Profile(memory=resident_bytes() + 200 * MB), []

    def batches():
        for batch in tiny_batches():
            yield batch
            ballast.append(np.ones(400 * MB, np.uint8))

    with pytest.raises(MemoryBudgetError, match="memory-mb"):
        train_rm_lora(tiny_model(), batches(), rm_config(), learning_rate=1e-2, seed=0, profile=profile)
    assert len(ballast) == 1


def test_the_size_of_weights_is_that_of_their_files(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    (tmp_path / "tokenizer.json").write_bytes(bytes(100))
    assert weight_bytes(tmp_path) == weight_bytes(tmp_path / "model.safetensors") == 1000
    assert weight_bytes("a-name/on-the-hub") == 0
