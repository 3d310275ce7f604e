"""Signatures, by which adapters are compared: rows whose distances are those of the adapters.

=============  ===============================================================================================
kind           a row is
=============  ===============================================================================================
``"factors"``  the flat adapter, as FL-TAC has it
``"product"``  the product B·A of each LoRA layer, since (BQ)(Q⁻¹A) is the same adapter; other arrays as is
=============  ===============================================================================================

A product is never formed. It is projected by two random matrices, as (L B)(A R), which has the same size for every
rank; L and R are drawn once, by the layer's sizes, with entries of variance 1/`SIDE`, so that the squared norm is
right on average. Rows are exact while all rows of a round fit in `EXACT` values. Beyond, they are sketched to
`WIDTH` values, one by one as they arrive: each entry is added, with a random sign, to one of `WIDTH` sums (M.
Charikar, K. Chen and M. Farach-Colton, "Finding Frequent Items in Data Streams", ICALP 2002; for distances K.
Weinberger et al., "Feature Hashing for Large Scale Multitask Learning", ICML 2009). The squared distance of two
rows is then right on average, with a relative variance of about 2/`WIDTH`. Our own change: the sums are not quite
random, since entries are first folded into lines of `FOLD`, a prime number, so that the columns of a layer do not
collide; only the line's sums are shuffled.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.lora import lora_pairs
from fedkit.arrays import NamedArrays, flatten
from fedkit.errors import ConfigError

Signature: TypeAlias = Literal["factors", "product"]
Row: TypeAlias = NDArray[np.float32]

WIDTH: Final = 256
"""Values of a sketched row."""
SIDE: Final = 32
"""Rows of L and columns of R; a layer that is no larger is not sketched."""
FOLD: Final = 8191
"""Sums into which a row is folded before it is sketched."""
EXACT: Final = 2**22
"""Rows are exact while all rows of a round have at most this many values."""


class Signatures:
    """Collects the rows of a round, one adapter at a time.

    Parameters
    ----------
    kind : {"factors", "product"}
        What is compared.

    Raises
    ------
    ConfigError
        For an unknown kind.
    """

    def __init__(self, kind: Signature = "factors") -> None:
        if kind not in get_args(Signature):
            raise ConfigError(f"signature: expected one of {', '.join(get_args(Signature))}, got {kind!r}.")
        self.kind = kind
        self._rows: list[Row] = []
        self._exact = True

    def add(self, adapter: NamedArrays) -> None:
        """Add an adapter's row."""
        row = signature(adapter, self.kind)
        if self._exact and (len(self._rows) + 1) * row.size > EXACT and row.size > WIDTH:
            self._rows = [sketch(known) for known in self._rows]
            self._exact = False
        self._rows.append(row if self._exact else sketch(row))

    def rows(self) -> NDArray[np.float64]:
        """Return all rows, in the order in which they came."""
        return np.stack(self._rows).astype(np.float64)


def signature(adapter: NamedArrays, kind: Signature) -> Row:
    """Return an adapter's row, exact."""
    return flatten(adapter) if kind == "factors" else _products(adapter)


def sketch(row: Row, width: int = WIDTH) -> Row:
    """Return the sketch of a row of any size: `width` values, a power of 2 up to `FOLD`."""
    signs, order = _places(row.size, width)
    padded = np.zeros(signs.shape, np.float32)
    padded.reshape(-1)[: row.size] = row
    folded = np.append(np.einsum("ij,ij->j", padded, signs), np.float32(0))
    return np.asarray(folded[order].sum(axis=1))


@lru_cache(maxsize=8)
def _places(size: int, width: int) -> tuple[NDArray[np.float32], NDArray[np.intp]]:
    """Return the entries' signs, one line of `FOLD` per row, and which sums add up; fixed for a size."""
    rng = np.random.default_rng([size, width])
    signs = rng.choice(np.array([-1, 1], np.float32), (-(-size // FOLD), FOLD))
    return signs, rng.permutation(-(-FOLD // width) * width).reshape(width, -1)


def _products(adapter: NamedArrays) -> Row:
    """Return the products of all LoRA layers, projected by L and R, then all other arrays."""
    pairs = lora_pairs(adapter)
    parts = []
    for pair in pairs:
        b, a = adapter[pair.b], adapter[pair.a]
        left, right = b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)
        parts.append((_seen(left, 0) @ _seen(right.T, 1).T).ravel())
    factors = {name for pair in pairs for name in pair}
    return np.concatenate([*parts, flatten({n: array for n, array in adapter.items() if n not in factors})])


def _seen(matrix: NDArray[np.float32], which: int) -> NDArray[np.float32]:
    """Return a matrix projected by L, or the transpose of R, to `SIDE` rows if it has more."""
    return matrix if len(matrix) <= SIDE else _view(len(matrix), which) @ matrix


@lru_cache(maxsize=32)
def _view(size: int, which: int) -> NDArray[np.float32]:
    """Return L, or the transpose of R, for `size` rows; always the same."""
    rng = np.random.default_rng([size, SIDE, which])
    return rng.standard_normal((SIDE, size), np.float32) / np.float32(np.sqrt(SIDE))
