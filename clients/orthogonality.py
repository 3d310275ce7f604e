"""RM-LoRA's regularizer, how far LoRA factors are from orthonormal, and its aim, the rank of their product.

The symbols are those of `fedkit.clients.rm_lora`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedkit.errors import ConfigError

from .broken_torchvision import naming_torchvision

with naming_torchvision():
    from peft.tuners.lora import LoraLayer

Penalty: TypeAlias = Literal["norm", "cosine"]
"""What is measured of A and B; the penalty is the mean over all of them.

"norm"
    ``||A A^T - I||_F`` and ``||B^T B - I||_F``, not squared. Where a norm is 0, its gradient counts as 0. This
    also fixes the scale of the update: where the penalty is 0, all singular values of α/r·BA are α/r. At B = 0 its
    gradient for B is 0, a saddle point: the pull on B begins after the first step of the task.
"cosine"
    The mean absolute cosine of two rows of A, and of two columns of B; "frd" in the released code. It does not
    depend on the scale. It is 0 for a zero row, and for r = 1, where there are no two rows.
"""


def lora_pairs(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, nn.Parameter]]:
    """Yield (layer name, A, B) of the active adapter, layer by layer."""
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            for adapter in module.active_adapters:
                if adapter in module.lora_A:
                    a, b = module.lora_A[adapter], module.lora_B[adapter]
                    yield name, a.get_parameter("weight"), b.get_parameter("weight")


class Orthogonality:
    """The penalty R of a model, computed from the values that its factors have when it is called.

    Factors of one shape are multiplied together, and those of one rank are measured together. For many layers this
    takes a few operations in all, rather than a few per layer.

    Parameters
    ----------
    model : nn.Module
        A PEFT model. Its modules must not be replaced, as they are not in training.
    penalty : {"norm", "cosine"}
        See `Penalty`.

    Raises
    ------
    ConfigError
        If the model has no LoRA layers.
    """

    def __init__(self, model: nn.Module, penalty: Penalty = "norm") -> None:
        self._penalty = penalty
        families: dict[tuple[int, torch.dtype, torch.device], dict[tuple[str, torch.Size], list[Tensor]]] = {}
        for _, *pair in lora_pairs(model):
            r = len(pair[0])
            for factor, parameter in zip("AB", pair, strict=True):
                family = families.setdefault((r, parameter.dtype, parameter.device), {})
                family.setdefault((factor, parameter.shape), []).append(parameter)
        if not families:
            raise ConfigError("the model has no LoRA layers: nothing to regularize.")
        self._families = [
            _Family(r, [(factor, group) for (factor, _), group in family.items()])
            for (r, *_), family in families.items()
        ]
        self._count = sum(family.size for family in self._families)

    def __call__(self) -> Tensor:
        """Return R, a scalar with gradients."""
        measure = _cosines if self._penalty == "cosine" else _norms
        parts = [measure(family.grams()) for family in self._families]
        return sum((part.to(parts[0].device) for part in parts[1:]), parts[0]) / self._count

    def add_gradient(self, weight: float) -> None:
        """Add what ``(weight * R).backward()`` adds to the factors' gradients, in far fewer operations."""
        for family in self._families:
            family.add_gradient(self._penalty, 2 * weight / self._count)


class _Family:
    """Factors of one rank, type and device; `groups` has, for each shape, "A" or "B" and the factors."""

    def __init__(self, r: int, groups: list[tuple[str, list[Tensor]]]) -> None:
        sizes, one = [len(group) for _, group in groups], groups[0][1][0]
        self.size = sum(sizes)
        self._eye = torch.eye(r, dtype=_precise(one.dtype), device=one.device)
        self._grams = self._eye.new_empty(self.size, r, r)
        self._flat = self._grams.view(self.size, -1)
        self.groups = [
            _Group(*group, grams=grams)
            for group, grams in zip(groups, torch.split_with_sizes(self._grams, sizes), strict=True)
        ]

    def grams(self) -> Tensor:
        """Return A A^T and B^T B of all factors, of shape (factors, r, r)."""
        return torch.cat([torch.bmm(*_sides(group.factor, group.stack())) for group in self.groups])

    @torch.no_grad()
    def add_gradient(self, penalty: Penalty, weight: float) -> None:
        """Add half the derivatives of R times a weight: D A for A, B D for B; D, symmetric, is that by A A^T."""
        stacks = [group.stack() for group in self.groups]
        beta = -1 if penalty == "norm" else 0
        for group, stack in zip(self.groups, stacks, strict=True):
            torch.baddbmm(self._eye, *_sides(group.factor, stack), beta=beta, out=group.grams)
        if penalty == "norm":
            norms = torch.linalg.vector_norm(self._flat, dim=1, keepdim=True)
            norms.clamp_min_(torch.finfo(norms.dtype).tiny)  # the derivative counts as 0 where there is none
            self._flat.div_(norms)
        else:
            self._grams.copy_(_by_cosines(self._grams))
        grads: list[Tensor] = []
        parts: list[Tensor] = []
        for group, stack in zip(self.groups, stacks, strict=True):
            left, right = (group.grams, stack) if group.factor == "A" else (stack, group.grams)
            torch.bmm(left, right, out=group.gradient)
            for parameter, part in zip(group.parameters, group.parts, strict=True):
                if parameter.requires_grad:
                    if parameter.grad is None:
                        parameter.grad = torch.zeros_like(parameter)
                    grads.append(parameter.grad)
                    parts.append(part)
        if grads:
            torch._foreach_add_(grads, parts, alpha=weight)


class _Group:
    """Factors of one shape, with buffers for what is computed for all of them together."""

    def __init__(self, factor: str, parameters: list[Tensor], grams: Tensor) -> None:
        self.factor, self.parameters, self.grams = factor, parameters, grams
        self.gradient = self.stack().detach()
        self.parts = self.gradient.view(-1, *parameters[0].shape).unbind()

    def stack(self) -> Tensor:
        """Return the factors stacked, shape (factors, r, ·) for A, (factors, ·, r) for B; convolutions flattened.

        Factors in half precision are converted to float32, since the squares of a small B would be zero otherwise.
        """
        return torch.stack(self.parameters).flatten(2).to(_precise(self.parameters[0].dtype))


def orthogonality_penalty(model: nn.Module, penalty: Penalty = "norm") -> Tensor:
    """Return R once: see `Orthogonality`."""
    return Orthogonality(model, penalty)()


@torch.no_grad()
def effective_rank(model: nn.Module) -> float:
    """Return exp(entropy of the normalized singular values of B A), averaged over all pairs: 0 to r.

    A product with r equal singular values counts as r, a zero product as 0.
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


def _precise(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _sides(factor: str, stack: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two stacks whose product is A A^T or B^T B."""
    return (stack, stack.mT) if factor == "A" else (stack.mT, stack)


def _norms(gram: Tensor) -> Tensor:
    """Return the sum of ||G - I||_F over a stack of Gram matrices."""
    norms: Tensor = torch.linalg.matrix_norm(
        gram - torch.eye(*gram.shape[1:], dtype=gram.dtype, device=gram.device)
    )
    return norms.sum()


def _cosines(gram: Tensor) -> Tensor:
    """Return the mean absolute cosine off the diagonal, summed over a stack of Gram matrices."""
    return (gram.abs() * _scale(gram)).sum()


def _by_cosines(gram: Tensor) -> Tensor:
    """Return the derivative of `_cosines`; 0 where it does not exist."""
    scale = _scale(gram)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    shrink = (gram.abs() * scale).sum(-1) / torch.where(squares > 0, squares, 1.0)
    return gram.sign() * scale - torch.diag_embed(shrink)


def _scale(gram: Tensor) -> Tensor:
    """Return factors that turn products of rows into cosines over the number of pairs; 0 on the diagonal."""
    r = gram.shape[-1]
    squares = gram.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(squares > 0, squares, 1.0).rsqrt()  # √ has no derivative at 0; such rows have cosine 0
    off = (1 - torch.eye(r, dtype=gram.dtype, device=gram.device)) / max(r * r - r, 1)
    return inverse[:, :, None] * inverse[:, None, :] * off
