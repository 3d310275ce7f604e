"""Several adapters in one set of named arrays: a client's slots, the server's clusters.

A TAC message has the adapters of one client, slot by slot, as ``slot-0/NAME``, ``slot-1/NAME``, ...; the server's
params have one adapter per cluster, as ``cluster-0/NAME``, ``cluster-1/NAME``, ... Arrays without such prefixes
are one adapter, so that an app with one task need not know about slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays, check_same_schema
from fedkit.errors import ConfigError, SchemaMismatchError

T = TypeVar("T", np.float32, np.bool_)


def join_slots(slots: Sequence[Mapping[str, NDArray[T]]]) -> dict[str, NDArray[T]]:
    """Return the adapters (or masks) of all slots as the arrays of one message, ``slot-0/NAME`` and so on."""
    return _join("slot", slots)


def split_slots(arrays: Mapping[str, NDArray[T]], num_slots: int) -> list[Mapping[str, NDArray[T]]]:
    """Return the adapters (or masks) of `num_slots` slots; a slot that is not in the arrays gets that of slot 0.

    Raises
    ------
    SchemaMismatchError
        For arrays that `join_slots` cannot have made.
    """
    slots = _split("slot", arrays)
    return [slots[number if number < len(slots) else 0] for number in range(num_slots)]


def count_slots(arrays: NamedArrays) -> int:
    """Return how many slots the arrays hold; raises as `split_slots`."""
    return len(_split("slot", arrays))


def join_clusters(adapters: Sequence[NamedArrays]) -> dict[str, NDArray[np.float32]]:
    """Return one adapter per cluster as the params of TAC, ``cluster-0/NAME`` and so on."""
    return _join("cluster", adapters)


def split_clusters(params: NamedArrays) -> list[NamedArrays]:
    """Return the adapter of each cluster; inverse of `join_clusters`.

    Raises
    ------
    SchemaMismatchError
        For arrays that `join_clusters` cannot have made.
    """
    return _split("cluster", params)


def only_cluster(params: NamedArrays) -> NamedArrays:
    """Return the adapter of an app with one task; works under TAC, too.

    Raises
    ------
    ConfigError
        If there are several clusters, since such an app could not say which one is its own.
    """
    clusters = split_clusters(params)
    if len(clusters) > 1:
        raise ConfigError(f"num-clusters: expected 1, for this app has one task, got {len(clusters)}.")
    return clusters[0]


def replicate(adapter: NamedArrays, num_clusters: int) -> NamedArrays:
    """Return params in which every cluster has the same adapter; TAC params are returned as they are.

    Raises
    ------
    SchemaMismatchError
        For TAC params with another number of clusters.
    """
    if not any(name.startswith("cluster-") for name in adapter):
        return join_clusters([adapter] * num_clusters)
    if (found := len(split_clusters(adapter))) != num_clusters:
        raise SchemaMismatchError(f"the arrays: expected {num_clusters} clusters, got {found}.")
    return adapter


def _join(kind: str, adapters: Sequence[Mapping[str, NDArray[T]]]) -> dict[str, NDArray[T]]:
    return {f"{kind}-{k}/{name}": array for k, each in enumerate(adapters) for name, array in each.items()}


def _split(kind: str, arrays: Mapping[str, NDArray[T]]) -> list[Mapping[str, NDArray[T]]]:
    if arrays and not any(name.startswith(f"{kind}-") for name in arrays):
        return [arrays]
    parts: dict[str, dict[str, NDArray[T]]] = {}
    for name, array in arrays.items():
        head, _, rest = name.partition("/")
        parts.setdefault(head, {})[rest] = array
    if not parts or list(parts) != [f"{kind}-{k}" for k in range(len(parts))]:
        raise SchemaMismatchError(f"the arrays: expected {kind}-0/NAME and so on, got {list(arrays)[:3]}.")
    adapters: list[Mapping[str, NDArray[T]]] = list(parts.values())
    for adapter in adapters:
        check_same_schema(adapter, like=adapters[0])
    return adapters
