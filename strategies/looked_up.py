"""Mappings whose values are computed on access, since each of them is as large as the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.protocol import Cohort
from fedkit.arrays import Mask, NamedArrays, flatten_mask
from fedkit.submodels import SubModel, embed


class Owned(Mapping[str, NDArray[np.bool_]]):
    """The entries that each part owns, flat, by name; computed on access, since every client may have its own."""

    def __init__(self, names: Set[str], entries: Callable[[str], Mask]) -> None:
        self._names = names
        self._entries = lru_cache(4)(lambda name: flatten_mask(entries(name)))

    def __getitem__(self, name: str) -> NDArray[np.bool_]:
        if name not in self._names:
            raise KeyError(name)
        return self._entries(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class Embedded(Mapping[int, NamedArrays]):
    """The arrays that nodes were sent, with the server's shapes and units."""

    def __init__(self, cohort: Cohort, down: Mapping[str, SubModel], like: NamedArrays) -> None:
        self._cohort, self._down, self._like = cohort, down, like

    def __getitem__(self, node_id: int) -> NamedArrays:
        sent = self._cohort.sent[node_id]
        return embed(sent, self._down[self._cohort.submodels[node_id]], like=self._like)

    def __iter__(self) -> Iterator[int]:
        return iter(self._cohort.sent)

    def __len__(self) -> int:
        return len(self._cohort.sent)
