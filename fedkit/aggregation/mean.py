"""Weighted means and the server step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays, zeros_like


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
