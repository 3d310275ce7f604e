"""Which nodes take part in a round."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from flwr.serverapp import Grid

from fedkit.errors import QuorumError


def sample_nodes(
    grid: Grid,
    *,
    fraction: float,
    minimum: int,
    available: int,
    timeout: float,
    order: Callable[[int], tuple[str, int]],
    seed: str,
) -> list[int]:
    """Return the nodes to ask, sorted by `order`; wait for enough of them, but not for ever.

    Parameters
    ----------
    fraction, minimum
        How many to ask: this share of those connected, but at least so many.
    available
        How many must be connected.
    timeout
        Seconds to wait for them.
    order
        A sort key that means the same in every run, so that the same seed means the same choice.
    seed
        Of the choice.

    Raises
    ------
    QuorumError
        If too few nodes are connected after `timeout`.
    """
    if fraction == 0:
        return []
    needed, deadline = max(available, minimum), time.monotonic() + timeout
    while len(node_ids := list(grid.get_node_ids())) < needed:
        if time.monotonic() > deadline:
            raise QuorumError(
                f"expected {needed} nodes within {timeout:.0f} s, got {len(node_ids)}. "
                "Start more SuperNodes, or lower min_available_nodes."
            )
        time.sleep(min(1.0, timeout))
    node_ids.sort(key=order)
    size = max(int(len(node_ids) * fraction), minimum)
    chosen = set(random.Random(seed).sample(node_ids, size))
    return [node_id for node_id in node_ids if node_id in chosen]
