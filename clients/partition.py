"""Partitioning one data set over the clients of an experiment; real clients have data of their own."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import ConfigError

DRAWS = 100
"""How often a split is drawn at most until every client has enough examples."""


def partition(
    labels: NDArray[np.int64], *, num_clients: int, alpha: float, seed: int, at_least: int = 10
) -> list[NDArray[np.int64]]:
    """Return each client's indices into `labels`: disjoint, covering all, with every class spread unevenly.

    Parameters
    ----------
    labels : NDArray[np.int64]
        The class of each example.
    num_clients : int
        How many parts to make.
    alpha : float
        Each class is spread by a draw from Dirichlet(`alpha`): 100 is even, 0.1 leaves most clients with
        few classes.
    seed : int
        Decides all random choices: the same seed gives the same parts on every machine.
    at_least : int
        The least number of examples of every client, so that its training is not one batch of one class.

    Raises
    ------
    ConfigError
        If no draw leaves every client `at_least` examples.
    """
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        parts: list[list[NDArray[np.int64]]] = [[] for _ in range(num_clients)]
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            pieces = split(members, rng.dirichlet(np.full(num_clients, alpha)))
            for part, piece in zip(parts, pieces, strict=True):
                part.append(piece)
        joined = [np.concatenate(part) for part in parts]
        if min(map(len, joined)) >= at_least:
            return joined
    raise ConfigError(
        f"no split gives {num_clients} clients {at_least} of {len(labels)} examples each "
        f"at dirichlet-alpha {alpha}. Take fewer clients or a larger dirichlet-alpha."
    )


def split(items: NDArray[np.int64], shares: NDArray[np.float64]) -> list[NDArray[np.int64]]:
    """Return consecutive pieces of `items`, whose lengths are in proportion to `shares`, which add up to 1.

    >>> [piece.tolist() for piece in split(np.arange(5), np.array([0.2, 0.8]))]
    [[0], [1, 2, 3, 4]]
    """
    return np.split(items, (np.cumsum(shares)[:-1] * len(items)).astype(np.int64))
