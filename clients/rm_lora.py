"""RM-LoRA: train LoRA factors towards full rank, a few rank-one components at a time.

Paper: "Enhancing Parameter Efficiency and Generalization in Large-Scale Models: A Regularized and Masked
Low-Rank Adaptation Approach" (Mao, Ping, Zhao, Liu and Ding, 2024), https://arxiv.org/abs/2407.12074.

A stock PEFT model stays as it is: `orthogonality_penalty` is a term of the loss, `mask_gradients` runs
between backward pass and optimizer step, and `train_rm_lora` is the loop that calls both.

==========  ====================  ==========================================================
paper       here                  meaning
==========  ====================  ==========================================================
A           ``lora_A``            factor of shape (r, in_features)
B           ``lora_B``            factor of shape (out_features, r)
r           ``r``                 rank of the adapter
k           ``active_rank``       rows of A and columns of B that one step may train
S_A, S_B    chosen components     uniform subsets of size k, drawn anew per step and pair
lambda      ``orth_reg_weight``   weight of the penalty R
R           orthogonality         mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F
==========  ====================  ==========================================================

The symbols are those of the authors' released code (github.com/yz-mao/RM-LoRA), which this follows.

Deviations
----------
* Only LoRA factors are masked. The released code zeroes the gradient of every other trainable tensor
  too, and so leaves a new classification head nearly untrained.
* Every step is masked, also the first, which the released code leaves unmasked.
* Weight decay is 0 and the learning rate constant: in federated rounds the server sets the schedule.

As in the released code, the mask holds back gradients, not updates: AdamW's momentum goes on moving rows
that an earlier step trained. A row never chosen does not move.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from fedkit.errors import ConfigError

Mask = Literal["paired", "independent"]
"""Whether B trains the same components as A ("v1" in the released code) or its own draw ("v2")."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RMLoraConfig:
    """What RM-LoRA needs to know; `active_rank` = `r` with `orth_reg_weight` = 0 is plain LoRA.

    Raises
    ------
    ConfigError
        If a value can never work.
    """

    r: int
    lora_alpha: int
    active_rank: int  # 1 to r
    mask: Mask = "paired"
    orth_reg_weight: float = 0.0  # the released scripts use 0 or 0.1
    target_modules: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.r < 1:
            raise ConfigError(f"r must be at least 1, got {self.r}.")
        if self.lora_alpha <= 0:
            raise ConfigError(f"lora_alpha must be positive, got {self.lora_alpha}.")
        if not 1 <= self.active_rank <= self.r:
            raise ConfigError(f"active_rank must be 1 to r = {self.r}, got {self.active_rank}.")
        if self.mask not in get_args(Mask):
            raise ConfigError(f"mask must be one of {get_args(Mask)}, got {self.mask!r}.")
        if not 0 <= self.orth_reg_weight < float("inf"):
            raise ConfigError(f"orth_reg_weight must be finite and at least 0, got {self.orth_reg_weight}.")
        if not self.target_modules:
            raise ConfigError("target_modules is empty: name the layers that shall carry LoRA factors.")


def lora_pairs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield (layer name, A, B) of the active adapter, layer by layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    a, b = module.lora_A[adapter], module.lora_B[adapter]
                    yield name, a.get_parameter("weight"), b.get_parameter("weight")


def orthogonality_penalty(model: nn.Module) -> Tensor:
    """Return the mean over all A and B of ||A A^T - I||_F and ||B^T B - I||_F: 0 if all are orthonormal.

    The norms are not squared. Where one is 0, so is its gradient.
    """
    norms = []
    for _, a, b in lora_pairs(model):
        rows, columns = a.flatten(1), b.flatten(1)
        identity = torch.eye(len(rows), dtype=a.dtype, device=a.device)
        norms += [
            torch.linalg.matrix_norm(rows @ rows.T - identity),
            torch.linalg.matrix_norm(columns.T @ columns - identity),
        ]
    if not norms:
        raise ConfigError("the model has no LoRA layers: nothing to regularize.")
    return torch.stack(norms).mean()


def mask_gradients(model: nn.Module, active_rank: int, mask: Mask, generator: torch.Generator) -> None:
    """Zero the gradient of all but `active_rank` random rows of each A and columns of each B.

    Parameters
    ----------
    model : nn.Module
        After the backward pass. Parameters other than LoRA factors, such as a head, keep their gradient.
    active_rank : int
        How many components keep theirs, 1 to r.
    mask : {"paired", "independent"}
        "paired": B keeps the columns that belong to A's rows. "independent": B's are drawn on their own.
    generator : torch.Generator
        On the CPU. Each pair draws from it anew.
    """
    for _, a, b in lora_pairs(model):
        idle_rows = idle_columns = torch.randperm(len(a), generator=generator)[active_rank:]
        if mask == "independent":
            idle_columns = torch.randperm(len(a), generator=generator)[active_rank:]
        if a.grad is not None:
            a.grad[idle_rows] = 0
        if b.grad is not None:
            b.grad[:, idle_columns] = 0


def train_rm_lora(
    model: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    config: RMLoraConfig,
    *,
    learning_rate: float,
    epochs: int = 1,
    seed: int,
    device: str = "cpu",
) -> dict[str, float]:
    """Train all trainable parameters of `model` in place with AdamW; return metrics of the training.

    Parameters
    ----------
    model : nn.Module
        A PEFT model, called as ``model(**batch)``; what it returns has a scalar ``loss``.
    batches : Iterable[Mapping[str, Tensor]]
        Gone through once per epoch. A DataLoader that shuffles does so by `seed`.
    config : RMLoraConfig
        What is masked and how strongly orthogonality pulls; the model must have been built with its `r`.
    learning_rate : float
        Constant over all steps.
    epochs : int
        Passes over `batches`.
    seed : int
        Decides masks, dropout and shuffling; the caller's random state is left alone.
    device : str
        Where to train; the model stays there.

    Returns
    -------
    dict[str, float]
        "train-loss", the mean task loss over all steps, and "effective-rank" after the last.

    Raises
    ------
    ConfigError
        If there is no batch.
    """
    model.to(device).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=learning_rate, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(epochs):
            for batch in batches:
                loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
                losses.append(loss.detach())
                if config.orth_reg_weight > 0:
                    loss = loss + config.orth_reg_weight * orthogonality_penalty(model)
                optimizer.zero_grad()
                loss.backward()
                if config.active_rank < config.r:
                    mask_gradients(model, config.active_rank, config.mask, generator)
                optimizer.step()
    if not losses:
        raise ConfigError("no batch to train on: is this client's data set empty, or epochs 0?")
    return {"train-loss": float(torch.stack(losses).mean()), "effective-rank": effective_rank(model)}


@torch.no_grad()
def effective_rank(model: nn.Module) -> float:
    """Return exp(entropy of the normalized singular values of B A), the mean over all pairs: 0 to r.

    A product of r equal singular values counts r, a zero product 0.
    """
    ranks = []
    for _, a, b in lora_pairs(model):
        # B A has the singular values of this r x r matrix, whatever the size of the layer.
        core = torch.linalg.qr(b.flatten(1).float()).R @ torch.linalg.qr(a.flatten(1).float().T).R.T
        values = torch.linalg.svdvals(core)
        shares = values / values.sum().clamp_min(torch.finfo(values.dtype).tiny)
        ranks.append(torch.special.entr(shares).sum().exp() if shares.any() else shares.sum())
    if not ranks:
        raise ConfigError("the model has no LoRA layers: there is no rank to measure.")
    return float(torch.stack(ranks).mean())
