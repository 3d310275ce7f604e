"""Weighted means and the server step."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays, zeros_like


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
