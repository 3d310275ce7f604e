"""How far LoRA factors are from orthonormal, and the rank of their product: RM-LoRA's regularizer and its aim.

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
"""How A and B are measured, the mean over all of them.

"norm"
    ``||A A^T - I||_F`` and ``||B^T B - I||_F``, not squared. Where one is 0, so is its gradient. It fixes the
    scale of the update, too: where it is 0, all singular values of α/r·BA are α/r. At B = 0 its gradient for B is
    0, a saddle: the pull on B begins after the first step of the task.
"cosine"
    The mean absolute cosine of two rows of A, and of two columns of B; "frd" in the released code. Free of scale;
    0 for a zero row, and for r = 1, which has no two rows.
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
    """The penalty R of a model, as a function of what its factors are when it is called.

    Factors of one shape are measured together: of many layers, that takes a few operations rather than a few per
    layer.

    Parameters
    ----------
    model : nn.Module
        A PEFT model. The modules must stay, as they do in training.
    penalty : {"norm", "cosine"}
        See `Penalty`.

    Raises
    ------
    ConfigError
        If the model has no LoRA layers.
    """

    def __init__(self, model: nn.Module, penalty: Penalty = "norm") -> None:
        self._measure = _cosines if penalty == "cosine" else _norms
        self._derive = _by_cosines if penalty == "cosine" else _by_norms
        self._groups: dict[tuple[object, ...], list[Tensor]] = {}  # of A, and of B
        for _, a, b in lora_pairs(model):
            self._groups.setdefault(("A", a.shape, a.dtype, a.device), []).append(a)
            self._groups.setdefault(("B", b.shape, b.dtype, b.device), []).append(b)
        if not self._groups:
            raise ConfigError("the model has no LoRA layers: nothing to regularize.")
        self._count = sum(map(len, self._groups.values()))

    def __call__(self) -> Tensor:
        """Return R, a scalar that gradients flow through."""
        total: Tensor | None = None
        for (factor, *_), group in self._groups.items():
            part = self._measure(_gram(torch.stack(group).flatten(2), factor))
            total = part if total is None else total + part.to(total.device)
        assert total is not None  # there are groups
        return total / self._count

    @torch.no_grad()
    def add_gradient(self, weight: float) -> None:
        """Add what ``(weight * R).backward()`` adds to the factors' gradients, in far fewer operations.

        With D, symmetric, the derivative of R by A A^T, that by A is 2 D A; by B it is 2 B D.
        """
        for (factor, *_), group in self._groups.items():
            trained = [parameter for parameter in group if parameter.requires_grad]
            if not trained:
                continue
            stack = torch.stack(trained).flatten(2)  # of convolutions
            derivative = self._derive(_gram(stack, factor))
            gradient = derivative @ stack if factor == "A" else stack @ derivative
            for parameter in trained:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            grads = [parameter.grad for parameter in trained if parameter.grad is not None]
            parts = gradient.view(-1, *trained[0].shape).unbind()
            torch._foreach_add_(grads, parts, alpha=2 * weight / self._count)


def orthogonality_penalty(model: nn.Module, penalty: Penalty = "norm") -> Tensor:
    """Return R, see `Orthogonality`, for one call."""
    return Orthogonality(model, penalty)()


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


def _gram(stack: Tensor, factor: object) -> Tensor:
    """Return A A^T or B^T B of a stack of factors."""
    return stack @ stack.mT if factor == "A" else stack.mT @ stack


def _norms(gram: Tensor) -> Tensor:
    """Return the sum of ||G - I||_F over a stack of Gram matrices."""
    norms: Tensor = torch.linalg.matrix_norm(
        gram - torch.eye(*gram.shape[1:], dtype=gram.dtype, device=gram.device)
    )
    return norms.sum()


def _by_norms(gram: Tensor) -> Tensor:
    """Return the derivative of `_norms`; 0 where the norm has none. `gram` is overwritten."""
    off = gram
    off.diagonal(dim1=-2, dim2=-1).sub_(1)
    norms = torch.linalg.vector_norm(off, dim=(1, 2), keepdim=True)
    return off.div_(norms.clamp_min_(torch.finfo(norms.dtype).tiny))


def _cosines(gram: Tensor) -> Tensor:
    """Return the sum of the mean absolute cosines off the diagonal, over a stack of Gram matrices."""
    return (gram.abs() * _scale(gram)).sum()


def _by_cosines(gram: Tensor) -> Tensor:
    """Return the derivative of `_cosines`; 0 where it has none."""
    scale = _scale(gram)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    shrink = (gram.abs() * scale).sum(-1) / torch.where(squares > 0, squares, 1.0)
    return gram.sign() * scale - torch.diag_embed(shrink)


def _scale(gram: Tensor) -> Tensor:
    """Return what turns products of rows into cosines, a share of the mean each; 0 on the diagonal."""
    r = gram.shape[-1]
    squares = gram.diagonal(dim1=-2, dim2=-1)
    inverse = torch.where(squares > 0, squares, 1.0).rsqrt()  # √ has no derivative at 0; such rows have cosine 0
    off = (1 - torch.eye(r, dtype=gram.dtype, device=gram.device)) / max(r * r - r, 1)
    return inverse[:, :, None] * inverse[:, None, :] * off
