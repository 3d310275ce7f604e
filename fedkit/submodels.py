"""Sub-models: the part of the server's arrays that one client holds, as index sets per array and axis.

The server has the whole model: the largest rank, the full width. A client that holds less is sent its slice,
trains it, and sends back its update; the server puts the update where it belongs, and averages each entry over the
clients that hold it, as in HeteroFL: E. Diao, J. Ding and V. Tarokh, "HeteroFL: Computation and Communication
Efficient Federated Learning for Heterogeneous Clients", ICLR 2021, https://arxiv.org/abs/2010.01264, equations 2
to 4.

A client's LoRA of rank rᵢ and its own αᵢ applies ``αᵢ/rᵢ·B·A``, where the server's applies ``α/r·B·A``. So that
both mean the same product, the client's B is the server's times ``(α/r)/(αᵢ/rᵢ)``: `SubModel.scales`, multiplied
on the way down and divided out on the way up. A is the same on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays, check_same_schema
from fedkit.errors import ConfigError

IndexSets: TypeAlias = tuple[NDArray[np.intp], ...]
"""The indices that are held, for each axis of an array."""


@dataclass(frozen=True, slots=True)
class SubModel:
    """The entries that a client holds, and what they are multiplied by when sent to it."""

    index_sets: Mapping[str, IndexSets]  # arrays not named here are not held
    scales: Mapping[str, float] = field(default_factory=dict)  # 1 for arrays not named here

    def take_mask(self, mask: Mask) -> dict[str, NDArray[np.bool_]]:
        """Return the client's part of a mask of the server's arrays."""
        return {name: mask[name][np.ix_(*sets)] for name, sets in self.index_sets.items()}

    def embed_mask(self, mask: Mask, *, like: NamedArrays | Mask) -> dict[str, NDArray[np.bool_]]:
        """Return a mask of the client's arrays among the server's: False where it holds nothing."""
        kept = {name: np.zeros(array.shape, np.bool_) for name, array in like.items()}
        for name, sets in self.index_sets.items():
            kept[name][np.ix_(*sets)] = mask[name]
        return kept


Cut: TypeAlias = Callable[[NamedArrays], SubModel]
"""A function from the server's arrays, of which only names and shapes matter, to a sub-model."""


def whole(like: NamedArrays) -> SubModel:
    """Return the sub-model that holds everything."""
    return SubModel({name: tuple(np.arange(n) for n in array.shape) for name, array in like.items()})


def without(submodel: SubModel, names: Collection[str]) -> SubModel:
    """Return the sub-model without some arrays."""
    kept = {name: sets for name, sets in submodel.index_sets.items() if name not in names}
    return SubModel(kept, submodel.scales)


def within(submodel: SubModel, part: SubModel) -> SubModel:
    """Return `part`, a sub-model of the arrays of `submodel`, as a sub-model of the server's arrays."""
    sets = {
        name: tuple(outer[inner] for outer, inner in zip(submodel.index_sets[name], indices, strict=True))
        for name, indices in part.index_sets.items()
    }
    scales = {name: submodel.scales.get(name, 1.0) * part.scales.get(name, 1.0) for name in sets}
    return SubModel(sets, {name: scale for name, scale in scales.items() if scale != 1.0})


def check(submodel: SubModel, *, like: NamedArrays) -> None:
    """Check that a sub-model fits these arrays.

    Raises
    ------
    ConfigError
        Naming the first array, and the axis, where it does not.
    """
    for name, sets in submodel.index_sets.items():
        if name not in like:
            raise ConfigError(
                f"sub-model: expected arrays of the model, got {name!r}. It has {list(like)[:3]}, ..."
            )
        shape = like[name].shape
        if len(sets) != len(shape):
            raise ConfigError(f"sub-model: array {name!r}: expected {len(shape)} index sets, got {len(sets)}.")
        for axis, (indices, size) in enumerate(zip(sets, shape, strict=True)):
            _check_indices(indices, size, f"array {name!r}, axis {axis}")
    for name, scale in submodel.scales.items():
        if not 0 < scale < float("inf"):
            raise ConfigError(f"sub-model: array {name!r}: expected a scale above 0 and finite, got {scale}.")


def take(arrays: NamedArrays, submodel: SubModel) -> dict[str, NDArray[np.float32]]:
    """Return the client's arrays, in the order of the server's."""
    taken = {}
    for name, array in arrays.items():
        if name in submodel.index_sets:
            part = np.asarray(array[np.ix_(*submodel.index_sets[name])], np.float32)
            scale = submodel.scales.get(name, 1.0)
            taken[name] = part if scale == 1.0 else part * np.float32(scale)
    return taken


def embed(arrays: NamedArrays, submodel: SubModel, *, like: NamedArrays) -> dict[str, NDArray[np.float32]]:
    """Return a client's arrays among the server's, zero where it holds nothing; inverse of `take`.

    Raises
    ------
    SchemaMismatchError
        If the arrays are not of this sub-model.
    """
    check_same_schema(arrays, like=shapes(submodel, like=like))
    embedded = {}
    for name, array in like.items():
        embedded[name] = np.zeros(array.shape, np.float32)
        if name in arrays:
            scale = submodel.scales.get(name, 1.0)
            part = arrays[name] if scale == 1.0 else arrays[name] / np.float32(scale)
            embedded[name][np.ix_(*submodel.index_sets[name])] = part
    return embedded


def owned(submodel: SubModel, *, like: NamedArrays) -> Mask:
    """Return a mask of the server's entries that the client holds."""
    kept = {name: np.zeros(array.shape, np.bool_) for name, array in like.items()}
    for name, sets in submodel.index_sets.items():
        kept[name][np.ix_(*sets)] = True
    return kept


def shapes(submodel: SubModel, *, like: NamedArrays) -> NamedArrays:
    """Return arrays with the names and shapes of a client's, without allocating memory."""
    sets = submodel.index_sets
    return {
        name: np.broadcast_to(np.float32(0), tuple(len(indices) for indices in sets[name]))
        for name in like
        if name in sets
    }


def is_factor(name: str, factor: str) -> bool:
    """Return whether this is the name of a LoRA factor, "lora_A" or "lora_B", as PEFT spells it."""
    return factor in name.split(".")


def lora_rank(r: int, *, lora_alpha: float | None = None, server_lora_alpha: float | None = None) -> Cut:
    """Return the cut that keeps the first `r` rows of every lora_A and columns of every lora_B, all else whole.

    Parameters
    ----------
    r : int
        The client's rank, at most the server's.
    lora_alpha, server_lora_alpha : float, optional
        α of the client's adapter and of the server's. Unset: both apply their factors with the same α/r.

    Raises
    ------
    ConfigError
        If one alpha is given without the other, or a number is not above 0; from the result, if the arrays have
        no LoRA factors, or fewer than `r` rows of one.
    """
    if r < 1 or (lora_alpha is None) != (server_lora_alpha is None):
        raise ConfigError(f"lora_rank: expected r of at least 1 and both alphas or none, got r={r}.")

    def cut(params: NamedArrays) -> SubModel:
        sets, scales = dict(whole(params).index_sets), {}
        for name, array in params.items():
            if is_factor(name, "lora_A"):
                sets[name] = (np.arange(r), *sets[name][1:])
            elif is_factor(name, "lora_B"):
                sets[name] = (sets[name][0], np.arange(r), *sets[name][2:])
                if lora_alpha is not None and server_lora_alpha is not None:
                    scales[name] = (server_lora_alpha / array.shape[1]) / (lora_alpha / r)
        if not any(is_factor(name, "lora_A") for name in sets):
            raise ConfigError(f"lora_rank: the arrays have no LoRA factors: {list(params)[:3]}.")
        return SubModel(sets, scales)

    return cut


def width(share: float, *, inputs: Collection[str] | None = None, outputs: Collection[str] | None = None) -> Cut:
    """Return the cut that keeps the leading `share` of every hidden axis, rounded up, as HeteroFL does.

    Axis 0 of an array is taken as its outputs, axis 1 as its inputs, as in torch; further axes, and those that
    face the data or the classes, stay whole.

    Parameters
    ----------
    share : float
        Above 0, at most 1. Choose it so that sizes that depend on each other, such as those before and after
        flattening, are cut consistently.
    inputs : collection of str, optional
        The arrays whose inputs are the data; by default the first with two axes or more.
    outputs : collection of str, optional
        The arrays whose outputs are the classes; by default the last with two axes or more, and all after it.

    Raises
    ------
    ConfigError
        If `share` is not in its range; from the result, if the arrays lack a name.
    """
    if not 0 < share <= 1:
        raise ConfigError(f"width: expected a share above 0 and at most 1, got {share}.")

    def cut(params: NamedArrays) -> SubModel:
        names = list(params)
        layers = [name for name in names if params[name].ndim >= 2] or names[:1]
        first = layers[:1] if inputs is None else inputs
        last = names[names.index(layers[-1]) :] if outputs is None else outputs
        if unknown := [name for name in [*first, *last] if name not in params]:
            raise ConfigError(f"width: expected arrays of the model, got {unknown[0]!r}.")
        sets = {}
        for name, array in params.items():
            hidden = (name not in last, name not in first)
            sets[name] = tuple(
                np.arange(math.ceil(share * size - 1e-9) if axis < 2 and hidden[axis] else size)
                for axis, size in enumerate(array.shape)
            )
        return SubModel(sets)

    return cut


def _check_indices(indices: NDArray[np.intp], size: int, where: str) -> None:
    indices = np.asarray(indices)
    if indices.ndim != 1 or (indices.size and indices.dtype.kind not in "iu"):
        raise ConfigError(
            f"sub-model: {where}: expected a vector of whole numbers, got {indices.dtype} {indices.ndim}d."
        )
    if indices.size and not (indices.min() >= 0 and indices.max() < size):
        raise ConfigError(
            f"sub-model: {where}: expected indices from 0 to {size - 1}, got {indices.min()} to {indices.max()}."
        )
    if np.unique(indices).size != indices.size:
        raise ConfigError(f"sub-model: {where}: an index is there twice.")
