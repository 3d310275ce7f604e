"""Weighted means and the server step.

`Mean` is FedAvg: H. B. McMahan et al., "Communication-Efficient Learning of Deep Networks from Decentralized
Data", AISTATS 2017, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.protocol import Aggregate, Cohort, StepSize, Upload, step_at
from fedkit.arrays import Mask, NamedArrays, add, flatten, num_values, unflatten, zeros_like


@dataclass(frozen=True, slots=True)
class Mean:
    """Steps along the mean of the updates that arrived, one of them in memory at a time."""

    weighted: bool = True  # by number of examples; False: every client counts the same
    step_size: StepSize = field(default=1.0, repr=False)  # what the mean is multiplied by, by round if callable

    def init(self, params: NamedArrays) -> None:
        """Return nothing: there is nothing to remember."""

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: None
    ) -> Aggregate[None]:
        """Return params + α · mean of the uploads."""
        mean = mean_of(uploads, self.weighted, like=params)
        size = step_at(self.step_size, cohort.server_round)
        return Aggregate(add(params, unflatten(size * mean, like=params)), None, {})


def mean_of(uploads: Iterable[Upload], weighted: bool, *, like: NamedArrays) -> NDArray[np.float32]:
    """Return the mean of the uploads as one vector, zeros if there are none."""
    total, sums = 0.0, np.zeros(num_values(like), np.float64)
    scaled = np.empty_like(sums)
    for upload in uploads:
        if upload.arrays is not None:
            weight = upload.num_examples if weighted else 1.0
            total += weight
            scaled[:] = flatten(upload.arrays)
            scaled *= weight
            sums += scaled
    if total:
        sums /= total
    return sums.astype(np.float32)


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
    return {name: (value / total if total else value).astype(np.float32) for name, value in sums.items()}


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
        name: np.divide(value, totals[name], out=np.zeros_like(value), where=totals[name] > 0).astype(np.float32)
        for name, value in sums.items()
    }
