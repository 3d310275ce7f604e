"""What RM-LoRA does around one optimizer step: hold back the components of A and B that rest in it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fedkit.errors import ConfigError
from fedkit.row_masks import Pairing, RowDraw

from .orthogonality import lora_pairs

Hold: TypeAlias = Literal["gradient", "update"]
"""What of a resting component is held back.

"gradient"
    Its gradient, as in the paper: momentum and weight decay go on moving components that an earlier step trained.
"update"
    All of it: neither the component nor its moments change in a step in which it rests. Its weight decays in the
    steps that train it. (The number of steps, by which Adam corrects its moments, is of the tensor, not the row.)
"""


class Idle(NamedTuple):
    """The components of one factor that rest in a step."""

    parameter: nn.Parameter
    axis: int  # 0: rows of A, 1: columns of B
    indices: Tensor


class MaskedStep:
    """Call `before` and `after` around ``optimizer.step()``; other parameters, such as a head, are left alone.

    Parameters
    ----------
    model : nn.Module
        A PEFT model.
    active_rank : int
        How many components of each layer a step trains.
    pairing : {"paired", "independent"}
        Whether B trains the same components as A, or its own draw.
    hold : {"gradient", "update"}
        See `Hold`.
    draw : RowDraw, optional
        The components that all steps train, as the server said; instead of a new draw in each step.
    """

    def __init__(
        self,
        model: nn.Module,
        active_rank: int,
        pairing: Pairing = "paired",
        hold: Hold = "gradient",
        draw: RowDraw | None = None,
    ) -> None:
        self._pairs = [(a, b) for _, a, b in lora_pairs(model)]
        if not self._pairs:
            raise ConfigError("the model has no LoRA layers: nothing to mask.")
        self._rank, self._pairing, self._hold = active_rank, pairing, hold
        self._fixed = None if draw is None else _resting(model, draw)
        self._saved: list[tuple[Idle, str, Tensor]] = []  # the values that a step may not change; "": no state
        self._idle: list[Idle] = []

    def before(self, generator: torch.Generator, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero the gradients of components that rest, after all else was done to gradients.

        Parameters
        ----------
        generator : torch.Generator
            On the CPU; each pair draws from it anew, unless the components are fixed.
        optimizer : torch.optim.Optimizer, optional
            With "update" only: what is about to step.
        """
        self._idle = list(self._drawn(generator)) if self._fixed is None else self._fixed
        for parameter, axis, indices in self._idle:
            if parameter.grad is not None:
                parameter.grad.index_fill_(axis, indices, 0)
        self._saved = []
        if self._hold == "update":
            if optimizer is None:
                raise ConfigError("hold: 'update' holds back what an optimizer does: tell `before` which.")
            for idle in self._idle:
                for key, tensor in _held(idle.parameter, optimizer):
                    self._saved.append((idle, key, tensor.index_select(idle.axis, idle.indices)))

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """Put back what rests, if it is held back whole; its moments, where this step made them, are zero."""
        if self._hold != "update":
            return
        saved = {(id(idle.parameter), key): values for idle, key, values in self._saved}
        for idle in self._idle:
            for key, tensor in _held(idle.parameter, optimizer):
                values = saved.get((id(idle.parameter), key))
                if values is None:
                    tensor.index_fill_(idle.axis, idle.indices, 0)
                else:
                    tensor.index_copy_(idle.axis, idle.indices, values)
        self._saved = []

    def _drawn(self, generator: torch.Generator) -> Iterator[Idle]:
        for a, b in self._pairs:
            rows = columns = torch.randperm(len(a), generator=generator)[self._rank :].to(a.device)
            if self._pairing == "independent":
                columns = torch.randperm(len(a), generator=generator)[self._rank :].to(a.device)
            yield Idle(a, 0, rows)
            yield Idle(b, 1, columns)


def mask_gradients(model: nn.Module, active_rank: int, mask: Pairing, generator: torch.Generator) -> None:
    """Zero the gradient of all but `active_rank` random rows of each A and columns of each B: `MaskedStep`, once.

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
    MaskedStep(model, active_rank, mask).before(generator)


def _resting(model: nn.Module, draw: RowDraw) -> list[Idle]:
    """Return what rests, by PEFT's names of the arrays, as the server has them."""
    resting = []
    for layer, a, b in lora_pairs(model):
        for factor, parameter, axis in (("lora_A", a, 0), ("lora_B", b, 1)):
            active = torch.from_numpy(draw.rows(f"{layer}.{factor}.weight", parameter.shape[axis]))
            idle = torch.ones(parameter.shape[axis], dtype=torch.bool).index_fill_(0, active, False)
            resting.append(Idle(parameter, axis, idle.nonzero().flatten().to(parameter.device)))
    return resting


def _held(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameter, and what the optimizer remembers of each of its entries, if it has a gradient."""
    if parameter.grad is None:
        return
    yield "", parameter.detach()
    for key, value in optimizer.state.get(parameter, {}).items():
        if isinstance(value, Tensor) and value.ndim > 0:  # unlike the number of steps
            if value.shape != parameter.shape:
                raise ConfigError(
                    f"hold: 'update' needs an optimizer that remembers values of each entry, as AdamW does; "
                    f"{type(optimizer).__name__} has {key!r} of shape {tuple(value.shape)}. Use 'gradient'."
                )
            yield key, value
