"""RM-LoRA: train LoRA factors towards full rank, a few rank-one components at a time.

Paper: "Enhancing Parameter Efficiency and Generalization in Large-Scale Models: A Regularized and Masked
Low-Rank Adaptation Approach" (Mao, Ping, Zhao, Liu and Ding, 2024), https://arxiv.org/abs/2407.12074.

A stock PEFT model is used unchanged: `Orthogonality` is a term of the loss, `MaskedStep` runs around the
optimizer's step, and `train_rm_lora` is a training loop that calls both. `fedkit.clients.rm_lora_trainer` does the
same for the Trainer of transformers.

==========  ====================  ==========================================================
paper       here                  meaning
==========  ====================  ==========================================================
A           ``lora_A``            factor of shape (r, in_features)
B           ``lora_B``            factor of shape (out_features, r)
r           ``r``                 rank of the adapter
k           ``active_rank``       rows of A and columns of B that one step may train
S_A, S_B    chosen components     uniform subsets of size k, drawn anew per step and pair
lambda      ``orth_reg_weight``   weight of the penalty R
R           `Orthogonality`       mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F
==========  ====================  ==========================================================

The symbols are those of the authors' released code (github.com/yz-mao/RM-LoRA), which this module follows.

Deviations
----------
* Only LoRA factors are masked. The released code zeroes the gradient of every other trainable tensor
  too, and so leaves a new classification head nearly untrained.
* Every step is masked, including the first, which the released code leaves unmasked.
* Weight decay is 0 and the learning rate is constant: in federated rounds the server sets the schedule.
* In a federation, a strategy's ``row_mask`` draws the components once a round, for all steps: `fedkit.row_masks`.

As in the released code, the mask holds back gradients, not updates: AdamW's momentum still moves rows that an
earlier step trained. A row that was never chosen does not move. With ``hold="update"``, neither a row nor its
moments change in a step that does not train it: see `fedkit.clients.masked_step`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor, nn

from fedkit.errors import ConfigError
from fedkit.row_masks import Pairing as Mask
from fedkit.row_masks import RowDraw

from .masked_step import Hold, MaskedStep, mask_gradients
from .orthogonality import Orthogonality, Penalty, effective_rank, lora_pairs, orthogonality_penalty
from .profiles import Profile

__all__ = [
    "Hold",
    "Mask",
    "MaskedStep",
    "Orthogonality",
    "Penalty",
    "RMLoraConfig",
    "effective_rank",
    "lora_pairs",
    "mask_gradients",
    "orthogonality_penalty",
    "train_rm_lora",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class RMLoraConfig:
    """Settings of RM-LoRA; `active_rank` = `r` with `orth_reg_weight` = 0 is plain LoRA.

    Raises
    ------
    ConfigError
        For impossible values.
    """

    r: int
    lora_alpha: int
    active_rank: int  # 1 to r
    mask: Mask = "paired"
    hold: Hold = "gradient"  # or "update": what is held back of inactive components
    orth_reg_weight: float = 0.0  # the released scripts use 0 or 0.1
    penalty: Penalty = "norm"  # or "cosine", which does not depend on the scale
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r must be at least 1, got {self.r}.")
        if self.lora_alpha <= 0:
            raise ConfigError(f"lora_alpha must be positive, got {self.lora_alpha}.")
        if not 1 <= self.active_rank <= self.r:
            raise ConfigError(f"active_rank must be 1 to r = {self.r}, got {self.active_rank}.")
        for name, kinds in (("mask", Mask), ("hold", Hold), ("penalty", Penalty)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"{name} must be one of {get_args(kinds)}, got {getattr(self, name)!r}.")
        if not 0 <= self.orth_reg_weight < float("inf"):
            raise ConfigError(f"orth_reg_weight must be finite and at least 0, got {self.orth_reg_weight}.")
        if not self.target_modules:
            raise ConfigError("target_modules is empty: name the layers that shall carry LoRA factors.")

    def masked_step(self, model: nn.Module, seed: int, rows: RowDraw | None = None) -> MaskedStep | None:
        """Return what to call around each optimizer step; None if every step trains all components.

        Components are drawn by `seed`. If the server chose the `rows`, all other components are held back whole
        ("update"), since any change in them would be lost.
        """
        if rows is not None:
            return MaskedStep(model, rows.active_rank, rows.pairing, "update", rows)
        if self.active_rank == self.r:
            return None
        return MaskedStep(model, self.active_rank, self.mask, self.hold, seed=seed)

    def regularizer(self, model: nn.Module) -> Orthogonality | None:
        """Return the penalty; None if its weight is 0."""
        return Orthogonality(model, self.penalty) if self.orth_reg_weight > 0 else None


def train_rm_lora(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    config: RMLoraConfig,
    *,
    learning_rate: float,
    epochs: int = 1,
    seed: int,
    profile: Profile | None = None,
    rows: RowDraw | None = None,
) -> dict[str, float]:
    """Train all trainable parameters of `model` in place with AdamW; return metrics of the training.

    Parameters
    ----------
    model : nn.Module
        A PEFT model, called as ``model(**batch)``; what it returns has a scalar ``loss``.
    batches : Iterable[Mapping[str, Tensor]]
        Iterated over once per epoch. A DataLoader that shuffles does so by `seed`.
    config : RMLoraConfig
        Sets the mask and the weight of the penalty; the model must have been built with its `r`.
    learning_rate : float
        Constant over all steps.
    epochs : int
        Passes over `batches`.
    seed : int
        Decides masks, dropout and shuffling; the caller's random state is left alone.
    profile : Profile, optional
        Where to train, in which precision, how many examples at once, and with how much memory; the model must
        have been prepared for it (`Profile.prepare`). Unset: in float32, on the model's device.
    rows : RowDraw, optional
        The components that the server wants trained (`fedkit.message.rows_of`). Every step then trains only
        these, whatever masks `config` sets.

    Returns
    -------
    dict[str, float]
        "train-loss", the mean task loss over all steps, and "effective-rank" after the last step.

    Raises
    ------
    ConfigError
        If there is no batch.
    MemoryBudgetError
        If, before a step, the process holds more memory than the profile allows.
    """
    profile = profile or Profile(device=str(next(model.parameters()).device))
    model.train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    masked, penalty = config.masked_step(model, seed, rows), config.regularizer(model)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(epochs):
            for batch in batches:
                profile.check_memory()
                optimizer.zero_grad()
                losses.append(_backward(model, batch, profile))
                if penalty:
                    penalty.add_gradient(config.orth_reg_weight)
                if masked:
                    masked.before(len(losses) - 1, optimizer)
                optimizer.step()
                if masked:
                    masked.after(optimizer)
    if not losses:
        raise ConfigError("no batch to train on: is this client's data set empty, or epochs 0?")
    return {"train-loss": float(torch.stack(losses).mean()), "effective-rank": effective_rank(model)}


def _backward(model: nn.Module, batch: Mapping[str, Tensor], profile: Profile) -> Tensor:
    """Add the gradient of the mean loss over a batch, piece by piece; return that loss."""
    losses = []
    for share, piece in profile.pieces(batch):
        with profile.autocast():
            loss = model(**piece).loss * share
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()
