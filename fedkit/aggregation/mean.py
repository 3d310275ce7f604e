"""Weighted means and the server step.

`Mean` is FedAvg: H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.lora import LORA_GAP, Products
from fedkit.aggregation.protocol import Aggregate, Cohort, StepSize, Upload, step_at
from fedkit.arrays import Mask, NamedArrays, add, flatten, num_values, unflatten, zeros_like

Total: TypeAlias = float | NDArray[np.float64]
"""The sum of the weights: over all clients, or for each entry over those that hold it."""

Owned: TypeAlias = Mapping[str, NDArray[np.bool_]]
NO_PARTS: Final[Owned] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Mean:
    """Steps along the mean of the updates that arrived, one of them in memory at a time."""

    weighted: bool = True  # by number of examples; False: every client counts the same
    step_size: StepSize = field(default=1.0, repr=False)  # what the mean is multiplied by, by round if callable
    gap: bool = field(default=False, repr=False)  # whether to measure the gap of LoRA factors: `Products`

    def init(self, params: NamedArrays) -> None:
        """Return nothing: there is nothing to remember."""

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: None
    ) -> Aggregate[None]:
        """Return params + α · mean of the uploads, of each entry over the clients that hold it."""
        size = step_at(self.step_size, cohort.server_round)
        products = Products(params) if self.gap else None
        if products:
            uploads = self._noted(uploads, cohort, products, size)
        mean = mean_of(uploads, self.weighted, like=params, owned=cohort.owned)
        new = add(params, unflatten(size * mean, like=params))
        return Aggregate(new, None, {LORA_GAP: products.gap(new)} if products else {})

    def _noted(
        self, uploads: Iterable[Upload], cohort: Cohort, products: Products, size: np.float32
    ) -> Iterator[Upload]:
        """Yield the uploads, and add each client's factors to the products on the way."""
        for upload in uploads:
            if upload.arrays is not None:
                moved = {name: size * array for name, array in upload.arrays.items()}
                products.add(upload.num_examples if self.weighted else 1.0, cohort.sent[upload.node_id], moved)
            yield upload


@dataclass(frozen=True, slots=True)
class MaskedMean:
    """SAFARI's mean of sparse updates: each entry is averaged over the clients whose mask keeps it.

    With `sparse_model`, as published, it is the mean of the masked models over all clients, which shrinks entries
    that few of them keep.
    """

    weighted: bool = True  # by number of examples; False: every client counts the same
    sparse_model: bool = False

    def init(self, params: NamedArrays) -> None:
        """Return nothing: there is nothing to remember."""

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: None
    ) -> Aggregate[None]:
        """Return the new parameters; the former ones if nobody sent any."""
        sent = (
            (upload.num_examples if self.weighted else 1.0, upload.arrays, _mask(upload, cohort, params))
            for upload in uploads
            if upload.arrays is not None
        )
        if not self.sparse_model:
            return Aggregate(add(params, owners_mean(sent, like=params)), None, {})
        first = next(sent, None)
        if first is None:
            return Aggregate(params, None, {})
        models = ((weight, _under(mask, add(params, update))) for weight, update, mask in chain([first], sent))
        return Aggregate(weighted_mean(models, like=params), None, {})


def _mask(upload: Upload, cohort: Cohort, params: NamedArrays) -> Mask | None:
    """Return which entries an upload covers; None: all."""
    own = cohort.owned.get(upload.submodel)
    return upload.mask if upload.mask is not None or own is None else unflatten(own, like=params)


def _under(mask: Mask | None, arrays: NamedArrays) -> NamedArrays:
    """Return the arrays with the entries that the mask drops set to zero."""
    return arrays if mask is None else {name: array * mask[name] for name, array in arrays.items()}


def mean_of(
    uploads: Iterable[Upload], weighted: bool, *, like: NamedArrays, owned: Owned = NO_PARTS
) -> NDArray[np.float32]:
    """Return the mean of the uploads as one vector, of each entry over the clients that hold it; zero if none."""
    total: Total = 0.0
    sums = np.zeros(num_values(like), np.float64)
    scaled = np.empty_like(sums)
    for upload in uploads:
        if upload.arrays is not None:
            weight = upload.num_examples if weighted else 1.0
            total = plus(total, weight, owned.get(upload.submodel))
            scaled[:] = flatten(upload.arrays)
            scaled *= weight
            sums += scaled
    return divided(sums, total).astype(np.float32)


def plus(total: Total, weight: float, own: NDArray[np.bool_] | None) -> Total:
    """Return the total plus one client's weight, at the entries that it holds; None: at all."""
    return total + (weight if own is None else weight * own.astype(np.float64))


def divided(sums: NDArray[np.float64], total: Total) -> NDArray[np.float64]:
    """Return sums / total, in place; zero where the total is zero."""
    if isinstance(total, float):
        return np.divide(sums, total, out=sums) if total else sums
    return np.divide(sums, total, out=sums, where=total > 0)


def weighted_mean(
    weighted: Iterable[tuple[float, NamedArrays]], *, like: NamedArrays
) -> dict[str, NDArray[np.float32]]:
    """Return Σ wᵢ·arraysᵢ / Σ wᵢ, one item in memory at a time; zeros if there is no item.

    The sums are float64, so that the result hardly depends on the order.
    """
    sums = {name: array.astype(np.float64) for name, array in zeros_like(like).items()}
    total = 0.0
    for weight, arrays in weighted:
        total += weight
        for name, array in arrays.items():
            sums[name] += weight * array.astype(np.float64)
    return {name: np.asarray(value / total if total else value, np.float32) for name, value in sums.items()}


def owners_mean(
    weighted: Iterable[tuple[float, NamedArrays, Mask | None]], *, like: NamedArrays
) -> dict[str, NDArray[np.float32]]:
    """Return, entry by entry, the weighted mean over those whose mask keeps the entry; zero where none does."""
    sums = {name: np.zeros(array.shape, np.float64) for name, array in like.items()}
    totals = {name: np.zeros(array.shape, np.float64) for name, array in like.items()}
    for weight, arrays, mask in weighted:
        for name, array in arrays.items():
            kept = 1.0 if mask is None else mask[name]
            sums[name] += weight * kept * array.astype(np.float64)
            totals[name] += weight * kept
    return {
        name: np.asarray(
            np.divide(value, totals[name], out=np.zeros_like(value), where=totals[name] > 0), np.float32
        )
        for name, value in sums.items()
    }
