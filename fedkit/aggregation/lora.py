"""Means of LoRA factors, and of their products.

The mean of the products ``Σ wᵢ BᵢAᵢ`` is what averaging whole models would give. The product of the mean factors
``(Σ wᵢBᵢ)(Σ wᵢAᵢ)`` is something else, unless all clients share one factor; how far it is off is the *gap*.

`ProductSum` adds products without forming them: the factors are stacked, and the stack is decomposed by two thin
QR decompositions and one small SVD. The matrix is formed only where the stack would be larger than the matrix
itself.

All factors here are in the server's units (`fedkit.submodels`), so one α/r applies to all, and cancels in the gap.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays

Matrix = NDArray[np.float64]

LORA_GAP: Final = "lora-gap"
"""The name of this round metric; see `Products.gap`."""

_NEGLIGIBLE: Final = 1e-7  # of the largest singular value: what float32 factors cannot tell from zero


class Pair(NamedTuple):
    """The names of the two factors of one layer."""

    a: str
    b: str


def lora_pairs(arrays: NamedArrays) -> list[Pair]:
    """Return the factors, layer by layer, by PEFT's names: ``….lora_A.weight`` with ``….lora_B.weight``."""
    pairs = []
    for name in arrays:
        parts = name.split(".")
        if "lora_A" in parts:
            other = ".".join("lora_B" if part == "lora_A" else part for part in parts)
            if other in arrays:
                pairs.append(Pair(name, other))
    return pairs


class ProductSum:
    """The sum of weighted products BA of one layer.

    Parameters
    ----------
    size : (int, int)
        Rows of B and columns of A.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        self.size = size
        self._left: list[Matrix] = []  # out × r, weighted
        self._right: list[Matrix] = []  # r × in
        self._dense: Matrix | None = None

    def add(self, weight: float, b: NDArray[np.float32], a: NDArray[np.float32]) -> None:
        """Add weight·BA; components that are zero, as those of a client of lower rank, cost nothing."""
        left, right = (
            b.reshape(self.size[0], -1).astype(np.float64),
            a.reshape(-1, self.size[1]).astype(np.float64),
        )
        used = left.any(axis=0) & right.any(axis=1)
        left, right = weight * left[:, used], right[used]
        if self._dense is not None:
            self._dense += left @ right
            return
        self._left.append(left)
        self._right.append(right)
        if sum(part.shape[1] for part in self._left) * sum(self.size) > math.prod(self.size):
            self._dense = np.hstack(self._left) @ np.vstack(self._right)
            self._left, self._right = [], []

    def scale(self, factor: float) -> None:
        """Multiply the sum by a number."""
        self._left = [factor * left for left in self._left]
        if self._dense is not None:
            self._dense *= factor

    def norm(self) -> float:
        """Return the Frobenius norm."""
        if self._dense is not None:
            return float(np.linalg.norm(self._dense))
        return float(np.linalg.norm(self._core()[1]))

    def distance(self, b: NDArray[np.float32], a: NDArray[np.float32]) -> float:
        """Return the Frobenius norm of the sum less BA."""
        other = ProductSum(self.size)
        other._left, other._right = list(self._left), list(self._right)
        other._dense = None if self._dense is None else self._dense.copy()
        other.add(-1.0, b, a)
        return other.norm()

    def svd(self) -> tuple[Matrix, Matrix, Matrix]:
        """Return U, σ, Vᵀ with U diag(σ) Vᵀ = the sum; σ descends, without values too small for float32."""
        if self._dense is not None:
            u, sigma, vt = np.linalg.svd(self._dense, full_matrices=False)
        else:
            left, core, right = self._core()
            u, sigma, vt = np.linalg.svd(core, full_matrices=False)
            u, vt = left @ u, vt @ right
        rank = int((sigma > _NEGLIGIBLE * sigma[0]).sum()) if sigma.size else 0
        return u[:, :rank], sigma[:rank], vt[:rank]

    def _core(self) -> tuple[Matrix, Matrix, Matrix]:
        """Return Q, C and Pᵀ with Q C Pᵀ = the sum, the columns of Q and P orthonormal, C small."""
        left = np.hstack([np.zeros((self.size[0], 0)), *self._left])
        right = np.vstack([np.zeros((0, self.size[1])), *self._right])
        (q, upper), (p, lower) = np.linalg.qr(left), np.linalg.qr(right.T)
        return q, upper @ lower.T, p.T


def factors(
    product: ProductSum, r: int, before: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return B and A of rank `r` with the product nearest to a sum of products; exact if its rank is at most `r`.

    The rows of A are orthogonal. A component's row of A and column of B both have length √σ, unless the rows of
    `before` are longer: then the row keeps their length, and the column takes the rest. So a component whose σ is
    small, or zero, can still grow, since its column gets gradients through a row of full length; with √σ on both
    sides, both would vanish together. A component whose σ is large trains as steadily as factors can; with all of
    σ in B, gradient descent on A would take steps σ times too long. The leading components come first, for clients
    that take fewer.

    Parameters
    ----------
    product : ProductSum
        The sum, of any rank.
    r : int
        The number of rows of A.
    before : NDArray[np.float32]
        The previous A. Its shortest nonzero row gives the minimum length of rows, and its rows fill those that the
        product does not determine, whose columns of B are zero.
    """
    u, sigma, vt = product.svd()
    kept = min(r, sigma.size)
    rows = before.reshape(r, -1).astype(np.float64)
    lengths = np.linalg.norm(rows, axis=1)
    length = lengths[lengths > 0].min(initial=np.inf) if lengths.any() else 1.0
    each = np.maximum(length, np.sqrt(sigma[:kept]))
    b, a = np.zeros((product.size[0], r)), np.zeros((r, product.size[1]))
    b[:, :kept] = u[:, :kept] * sigma[:kept] / each
    a[:kept] = vt[:kept] * each[:, None]
    if kept < r:
        a[kept:] = _completion(vt[:kept], rows, r - kept) * length
    signs = np.where(np.einsum("ij,ij->i", a, rows) < 0, -1.0, 1.0)  # as before, so that A turns least
    return (b * signs).astype(np.float32), (a * signs[:, None]).astype(np.float32)


def _completion(rows: Matrix, candidates: Matrix, count: int) -> Matrix:
    """Return `count` unit rows from `candidates`, orthogonal to `rows` and each other as far as there is room."""
    spare = np.random.default_rng(0).standard_normal((count, rows.shape[1]))
    q = np.linalg.qr(np.vstack([rows, candidates, spare]).T)[0].T[len(rows) :][:count]
    spare[: len(q)] = q
    return np.asarray(spare / np.linalg.norm(spare, axis=1, keepdims=True))


class Products:
    """The mean of the products of the clients' factors, layer by layer."""

    def __init__(self, like: NamedArrays) -> None:
        self.sums: Mapping[Pair, ProductSum] = {
            pair: ProductSum((like[pair.b].shape[0], int(np.prod(like[pair.a].shape[1:]))))
            for pair in lora_pairs(like)
        }
        self.total = 0.0  # of the weights

    def add(self, weight: float, arrays: NamedArrays, update: NamedArrays | None = None) -> None:
        """Add a client's arrays, or those plus an update."""
        self.total += weight
        for pair, product in self.sums.items():
            b, a = (arrays[name] if update is None else arrays[name] + update[name] for name in (pair.b, pair.a))
            product.add(weight, b, a)

    def shift(self, weight: float, arrays: NamedArrays) -> None:
        """Add the products of arrays that are no client's, times `weight`; `total` does not change."""
        for pair, product in self.sums.items():
            product.add(weight, arrays[pair.b], arrays[pair.a])

    def means(self) -> Mapping[Pair, ProductSum]:
        """Return each layer's mean, after everything was added."""
        for product in self.sums.values():
            product.scale(1 / (self.total or 1.0))
        self.total = 1.0
        return self.sums

    def gap(self, params: NamedArrays) -> float:
        """Return how far the products of `params` are from the mean of the products, relative to that; exactly.

        Over all layers: the square root of the sums of squares, ``‖Σ wᵢBᵢAᵢ − B̄Ā‖ / ‖Σ wᵢBᵢAᵢ‖``; 0 if nothing
        was added, or all products are zero.
        """
        apart = norm = 0.0
        for pair, product in self.means().items():
            apart += product.distance(params[pair.b], params[pair.a]) ** 2
            norm += product.norm() ** 2
        return math.sqrt(apart / norm) if norm else 0.0
