"""The similarity of clients by what they sent: O(clients²) numbers, whatever the model's size.

==========  ==========================================================================================
metric      of two clients whose uploads came in one round
==========  ==========================================================================================
"cosine"    of their updates, over the entries that both sent; the mean over such rounds, recent ones counting more
"l2"        minus the distance of their models, that of the last such round: as far as it is known, SAFARI's own
==========  ==========================================================================================

The distance of sparse models mostly measures how their masks differ, and shrinks as training goes on, so that
values of different rounds are not comparable; cosines are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

Metric: TypeAlias = Literal["cosine", "l2"]

DECAY: Final = 0.7  # weight of the cosines of earlier rounds relative to a new one
_COLUMNS: Final = 2**15  # entries compared at a time, to copy only so many of each upload


@dataclass(frozen=True, slots=True)
class Similarity:
    """The similarity of each pair of clients so far."""

    clients: tuple[str, ...] = ()
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    counts: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))

    def observe(self, names: Sequence[str], values: NDArray[np.float64], *, keep_last: bool) -> Similarity:
        """Return this with one more value, shape (n, n), for every pair of `names`; NaN: none.

        Several values of a pair are averaged, the last one counting most, or the last one is kept.
        """
        decay = 0.0 if keep_last else DECAY
        clients = (*self.clients, *(name for name in names if name not in self.clients))
        more = len(clients) - len(self.clients)
        sums, counts = np.pad(self.sums, (0, more)), np.pad(self.counts, (0, more))
        index = {name: i for i, name in enumerate(clients)}
        at = np.ix_(*[[index[name] for name in names]] * 2)
        known = ~np.isnan(values)
        sums[at] = np.where(known, np.nan_to_num(values) + decay * sums[at], sums[at])
        counts[at] = np.where(known, 1 + decay * counts[at], counts[at])
        return Similarity(clients, sums, counts)

    def of(self, client: str) -> float:
        """Return a client's similarity to itself from answer to answer; 0 if unknown."""
        if client not in self.clients:
            return 0.0
        me = self.clients.index(client)
        return float(self.sums[me, me] / (self.counts[me, me] or 1))

    def nearest(self, client: str, among: Sequence[str]) -> tuple[str, float] | None:
        """Return the most similar of `among` and its value; if equal to nine digits, the first; None: unknown."""
        index = {name: i for i, name in enumerate(self.clients)}
        if client not in index:
            return None
        sums, counts = self.sums[index[client]], self.counts[index[client]]
        values = {
            name: round(float(sums[j] / counts[j]), 9)
            for name in among
            if (j := index.get(name)) is not None and counts[j]
        }
        return max(values.items(), key=lambda item: item[1], default=None)


def cosines(rows: Sequence[NDArray[np.float32]], kept: Sequence[NDArray[np.bool_] | None]) -> NDArray[np.float64]:
    """Return the cosine of each pair of rows over the entries that both keep, shape (n, n); NaN: there is none.

    Parameters
    ----------
    rows : sequence of arrays
        Flat, of one size, zero where an entry is not kept.
    kept : sequence of arrays
        Which entries of each row are kept; None: all.
    """
    gram, shared = (np.zeros((len(rows), len(rows))) for _ in range(2))
    for columns in _cuts(rows):
        values = np.stack([row[columns] for row in rows]).astype(np.float64)
        masks = np.stack([np.ones(values.shape[1]) if mask is None else mask[columns] for mask in kept])
        gram += values @ values.T
        shared += np.square(values) @ masks.T.astype(np.float64)  # [i, j]: of i, over the entries that j keeps
    norms = np.sqrt(shared * shared.T)
    return np.divide(gram, norms, out=np.full_like(gram, np.nan), where=norms > 0)


def distances(rows: Sequence[NDArray[np.float32]]) -> NDArray[np.float64]:
    """Return minus the Euclidean distance of each pair of rows, shape (n, n)."""
    gram = np.zeros((len(rows), len(rows)))
    for columns in _cuts(rows):
        values = np.stack([row[columns] for row in rows]).astype(np.float64)
        gram += values @ values.T
    size = np.diag(gram)
    return -np.sqrt(np.maximum(size[:, None] + size - 2 * gram, 0))


def _cuts(rows: Sequence[NDArray[np.float32]]) -> list[slice]:
    return [slice(start, start + _COLUMNS) for start in range(0, rows[0].size, _COLUMNS)]
