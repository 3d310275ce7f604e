"""RM-LoRA's masked optimizer step: the components of A and B that are not active in it are held back."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedkit.errors import ConfigError
from fedkit.row_masks import Pairing, RowDraw

from .orthogonality import lora_pairs

Hold: TypeAlias = Literal["gradient", "update"]
"""What is held back of a component that is not active in a step.

"gradient"
    Its gradient, as in the paper: momentum and weight decay still move components that an earlier step trained.
"update"
    Its whole update: neither the component nor its optimizer moments change. Its weight decays only in the steps
    that train it. (Adam corrects the moments by the number of steps of the whole tensor, not of the row.)
"""

BLOCK: Final = 16
"""The number of steps whose masks are drawn, and copied to the device, at once."""

MOMENTS: Final = {
    "momentum_buffer",
    "exp_avg",
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "grad_avg",
}
"""The names of running means of gradients in the state of torch's optimizers; they begin at zero."""

_Held: TypeAlias = dict[str, tuple[list[int], list[Tensor]]]


class Group:
    """Factors of one shape, type and device, which can be processed together in few operations.

    Parameters
    ----------
    parameters : list[nn.Parameter]
        The factors.
    axis : int
        The axis of the components; 0: rows of A, 1: columns of B.
    places : list[int]
        The index of each factor's pair among the pairs of this rank.
    """

    def __init__(self, parameters: list[nn.Parameter], axis: int, places: list[int]) -> None:
        self.parameters, self.axis, self.places = parameters, axis, torch.tensor(places)
        first = parameters[0]
        self.r = first.shape[axis]
        self._sizes = [size if other == axis else 1 for other, size in enumerate(first.shape)]
        self._stack = torch.ones(len(parameters), *first.shape, dtype=first.dtype, device=first.device)
        self.masks = self._stack.unbind()  # 1 where the step trains, else 0; of full shape, as foreach needs

    def spread(self, active: Tensor) -> tuple[Tensor, ...]:
        """Return the active components of each step in the form that `mask` takes; shape (steps, factors, r)."""
        return active.view(*active.shape[:2], *self._sizes).to(self._stack.device).unbind()

    def mask(self, active: Tensor) -> None:
        """Set the masks of the current step."""
        self._stack.copy_(active)


class MaskedStep:
    """Masks optimizer steps: call `before` and `after` around ``optimizer.step()``.

    Other parameters than LoRA factors, such as a head, are not masked.

    Parameters
    ----------
    model : nn.Module
        A PEFT model.
    active_rank : int
        How many components of each layer a step trains.
    pairing : {"paired", "independent"}
        Whether B trains the same components as A, or has a draw of its own.
    hold : {"gradient", "update"}
        See `Hold`.
    draw : RowDraw, optional
        The components that every step trains, as the server chose them; unset: a new draw in each step.
    seed : int
        Of the draws. The draw of each pair in a step depends only on the seed and the step's number.
    """

    def __init__(
        self,
        model: nn.Module,
        active_rank: int,
        pairing: Pairing = "paired",
        hold: Hold = "gradient",
        draw: RowDraw | None = None,
        *,
        seed: int = 0,
    ) -> None:
        self._rank, self._pairing, self._hold, self._seed = active_rank, pairing, hold, seed
        self._groups, self._ranks = _groups(model)
        if not self._groups:
            raise ConfigError("the model has no LoRA layers: nothing to mask.")
        self._fixed = draw is not None
        if draw is not None:
            _fix(model, self._groups, draw)
        self._block = -1  # the number of the block of steps that `_drawn` is for
        self._drawn: list[tuple[Tensor, ...]] = []  # the active components, by group
        self._held: list[_Held] = []  # by group: what a step may not change in inactive components
        self._saved: list[dict[str, Tensor]] = []  # its values before the step, stacked

    @torch.no_grad()
    def before(self, step: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Zero the gradients of inactive components; call it after everything else that changes gradients.

        Parameters
        ----------
        step : int
            The number of the optimizer step, from 0 on.
        optimizer : torch.optim.Optimizer, optional
            The optimizer that is about to step; needed with "update" only.
        """
        if not self._fixed:
            self._draw(step)
        grads: list[Tensor] = []
        masks: list[Tensor] = []
        for group in self._groups:
            for parameter, mask in zip(group.parameters, group.masks, strict=True):
                if parameter.grad is not None:
                    grads.append(parameter.grad)
                    masks.append(mask)
        if grads:
            torch._foreach_mul_(grads, masks)
        if self._hold == "update":
            if optimizer is None:
                raise ConfigError("hold: 'update' holds back what an optimizer does: tell `before` which.")
            self._held = [_held(group, optimizer) for group in self._groups]
            self._saved = [
                {key: torch.stack(tensors) for key, (_, tensors) in held.items()} for held in self._held
            ]

    @torch.no_grad()
    def after(self, optimizer: torch.optim.Optimizer) -> None:
        """With "update", restore inactive components and their moments, or zero moments that the step created."""
        now: list[Tensor] = []
        saved: list[Tensor] = []
        masks: list[Tensor] = []
        for group, held, before in zip(self._groups, self._held, self._saved, strict=False):
            for key, (rows, tensors) in held.items():
                now += tensors
                saved += before[key].unbind()
                masks += [group.masks[row].to(tensors[0].dtype) for row in rows]
            begun = len(held) > 1 and len({len(rows) for rows, _ in held.values()}) == 1
            if not begun:  # before this step the optimizer had no state for some factors
                for key, (rows, tensors) in _held(group, optimizer).items():
                    for row, tensor in zip(rows, tensors, strict=True):
                        if key in MOMENTS and row not in held.get(key, ((), ()))[0]:
                            tensor.mul_(group.masks[row])
        if now:
            torch._foreach_lerp_(saved, now, masks)  # exact both where the mask is 0 and where it is 1
            torch._foreach_copy_(now, saved)
        self._held, self._saved = [], []

    def _draw(self, step: int) -> None:
        """Set the masks of a step: the `active_rank` smallest entries of a random permutation for each pair."""
        block, place = divmod(step, BLOCK)
        if block != self._block:
            generator = torch.Generator().manual_seed((self._seed * 1_000_003 + block) % 2**63)
            draws = 1 if self._pairing == "paired" else 2
            active = {
                r: torch.rand(BLOCK, draws, count, r, generator=generator).argsort(-1) < self._rank
                for r, count in self._ranks.items()
            }
            of_groups = [active[group.r][:, group.axis % draws, group.places] for group in self._groups]
            self._drawn = [group.spread(own) for group, own in zip(self._groups, of_groups, strict=True)]
            self._block = block
        for group, steps in zip(self._groups, self._drawn, strict=True):
            group.mask(steps[place])


def mask_gradients(model: nn.Module, active_rank: int, mask: Pairing, generator: torch.Generator) -> None:
    """Zero the gradients of all but `active_rank` random rows of each A and columns of each B, for one step.

    Parameters
    ----------
    model : nn.Module
        A PEFT model after the backward pass. Parameters other than LoRA factors, such as a head, keep their
        gradient.
    active_rank : int
        How many components keep their gradient, 1 to r.
    mask : {"paired", "independent"}
        "paired": B keeps the columns that belong to A's rows. "independent": B's columns are drawn separately.
    generator : torch.Generator
        A generator on the CPU. Each call draws from it anew.
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    MaskedStep(model, active_rank, mask, seed=seed).before(0)


def _groups(model: nn.Module) -> tuple[list[Group], dict[int, int]]:
    """Return the factors, grouped by shape, type and device, and the number of pairs of each rank."""
    groups: dict[tuple[object, ...], tuple[list[nn.Parameter], int, list[int]]] = {}
    ranks: dict[int, int] = {}
    for _, *pair in lora_pairs(model):
        r = len(pair[0])
        for axis, parameter in enumerate(pair):
            key = (axis, parameter.shape, parameter.dtype, parameter.device)
            parameters, _, places = groups.setdefault(key, ([], axis, []))
            parameters.append(parameter)
            places.append(ranks.get(r, 0))
        ranks[r] = ranks.get(r, 0) + 1
    return [Group(*found) for found in groups.values()], ranks


def _fix(model: nn.Module, groups: list[Group], draw: RowDraw) -> None:
    """Set the masks for all steps, by the PEFT names of the arrays, which the server uses, too."""
    names: dict[nn.Parameter, str] = {}
    for layer, a, b in lora_pairs(model):
        names |= {a: f"{layer}.lora_A.weight", b: f"{layer}.lora_B.weight"}
    for group in groups:
        active = torch.zeros(len(group.parameters), group.r, dtype=torch.bool)
        for row, parameter in zip(active, group.parameters, strict=True):
            row[torch.from_numpy(draw.rows(names[parameter], group.r))] = True
        group.mask(group.spread(active[None])[0])


def _held(group: Group, optimizer: torch.optim.Optimizer) -> _Held:
    """Return the factors that have a gradient, with the optimizer's state for each of their entries.

    Keys are the names of the state's tensors, "" for the factors; values are which of the group's factors have
    such a tensor, and the tensors.
    """
    found: _Held = {}
    for row, parameter in enumerate(group.parameters):
        if parameter.grad is None:
            continue
        for key, value in {"": parameter.detach(), **optimizer.state.get(parameter, {})}.items():
            if isinstance(value, Tensor) and value.ndim > 0:  # unlike the number of steps
                if value.shape != parameter.shape:
                    raise ConfigError(
                        f"hold: 'update' needs an optimizer that remembers values of each entry, as AdamW does; "
                        f"{type(optimizer).__name__} has {key!r} of shape {tuple(value.shape)}. Use 'gradient'."
                    )
                rows, tensors = found.setdefault(key, ([], []))
                rows.append(row)
                tensors.append(value)
    return found
