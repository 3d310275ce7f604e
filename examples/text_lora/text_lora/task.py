"""Training and evaluation of the text example; its data are in `data`, its models in `model`.

torch is imported inside the functions: Flower imports this module for every message, also where nothing is
trained.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedkit.clients import kept
from fedkit.config import RunConfig
from fedkit.errors import ConfigError

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from peft import PeftModel

    from fedkit.clients.profiles import Profile
    from fedkit.row_masks import RowDraw

TASKS = ("classification", "language-modelling")
BATCH = 64
"""How many texts are tested at once."""
IGNORED = -100
"""The label of a token that no loss counts, as transformers has it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """The keys of `[tool.flwr.app.config]`, typed; each stands there in kebab-case."""

    task: str  # one of `TASKS`
    model: str  # a folder or a name on the hub; empty: a small one, see `text_lora.model`
    target_modules: str  # the layers that carry LoRA factors, separated by blanks; empty: PEFT's choice
    data: str  # what `datasets` loads: a folder, or a name on the hub; empty: sentences of two manuals
    data_config: str  # which configuration of a data set on the hub, if it has several
    text_column: str
    label_column: str  # its values are 0, 1, … up to `num_labels` - 1; none is needed to model language
    num_labels: int
    max_tokens: int  # what a text has beyond is cut off
    dirichlet_alpha: float  # how unevenly labels are spread: 100 is evenly
    learning_rate: float
    local_steps: int
    batch_size: int
    r: int
    lora_alpha: int
    active_rank: int  # `r`, with an `orth_reg_weight` of 0: plain LoRA
    orth_reg_weight: float

    def __post_init__(self) -> None:
        # Named, for a dataclass with slots is another class than the one `super()` was compiled in.
        RunConfig.__post_init__(self)
        if self.task not in TASKS:
            raise ConfigError(f"task: expected one of {TASKS}, got {self.task!r}.")


def local_seed(config: Config, server_round: int, partition_id: int) -> int:
    """Return the seed of one client's training in one round: another for each, the same when run again."""
    return int(np.random.SeedSequence((config.seed, server_round, partition_id)).generate_state(1)[0])


def encode(rows: Dataset, batches: list[NDArray[np.int64]], config: Config) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the model's input for each batch of rows, padded to the longest of the batch."""
    import torch

    from text_lora.model import load_tokenizer

    tokenizer = kept(load_tokenizer, config)
    for batch in batches:
        chosen: dict[str, Any] = rows[batch]
        tokens = tokenizer(
            chosen[config.text_column],
            padding=True,
            truncation=True,
            max_length=config.max_tokens,
            return_token_type_ids=False,
            return_tensors="pt",
        )
        if config.task == "classification":
            labels = torch.tensor(chosen[config.label_column])
        else:  # the model itself shifts them by one
            labels = tokens["input_ids"].masked_fill(tokens["attention_mask"] == 0, IGNORED)
        yield {**tokens, "labels": labels}


def train(
    model: PeftModel,
    rows: Dataset,
    config: Config,
    *,
    seed: int,
    profile: Profile | None = None,
    draw: RowDraw | None = None,
) -> dict[str, float]:
    """Train the adapter of `model` in place with RM-LoRA, `local-steps` steps on random rows; return the metrics.

    `profile` says what the device can carry, `draw` which rows of the factors the server wants trained, if any.
    """
    from fedkit.clients.rm_lora import RMLoraConfig, train_rm_lora

    rng = np.random.default_rng(seed)
    batches = [rng.choice(len(rows), config.batch_size, replace=False) for _ in range(config.local_steps)]
    rm_lora = RMLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        active_rank=config.active_rank,
        orth_reg_weight=config.orth_reg_weight,
        target_modules=tuple(model.peft_config[model.active_adapter].target_modules),
    )
    return train_rm_lora(
        model,
        encode(rows, batches, config),
        rm_lora,
        learning_rate=config.learning_rate,
        seed=seed,
        rows=draw,
        profile=profile,
    )


def evaluate(model: PeftModel, rows: Dataset, config: Config) -> dict[str, float]:
    """Return the accuracy of `model` on the rows, a share in [0, 1], and its mean loss.

    Counted are labels or, of language, next tokens; there "perplexity" is e to the loss.
    """
    import torch

    # Texts of one length together, so that there is little padding to compute.
    order = np.argsort([len(text) for text in rows[config.text_column]], kind="stable")
    language, device = config.task == "language-modelling", next(model.parameters()).device
    model.eval()
    count, right, loss = 0, 0, 0.0
    with torch.inference_mode():
        for batch in encode(rows, np.split(order, range(BATCH, len(order), BATCH)), config):
            batch = {name: value.to(device) for name, value in batch.items()}
            output, labels = model(**batch), batch["labels"]
            logits = output.logits[:, :-1] if language else output.logits
            labels = labels[:, 1:] if language else labels
            counted = int((labels != IGNORED).sum())
            right += int((logits.argmax(-1) == labels).sum())
            loss += float(output.loss) * counted
            count += counted
    metrics = {"accuracy": right / count, "loss": loss / count}
    return metrics | ({"perplexity": math.exp(metrics["loss"])} if language else {})
