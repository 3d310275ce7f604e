"""Waiting for nodes, and choosing those that take part in a round."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence

from fedkit.errors import QuorumError
from fedkit.rounds import RoundGrid

logger = logging.getLogger(__name__)


def wait_for_nodes(
    grid: RoundGrid,
    server_round: int,
    *,
    wanted: int,
    enough: int,
    at_least: int,
    training: bool,
    timeout: float,
    missing: Callable[[Sequence[int]], Sequence[str]],
) -> list[int]:
    """Return the connected nodes as soon as there are enough of them.

    Parameters
    ----------
    wanted
        How many should be connected in the first round.
    enough
        How many must be connected in a later round, and in the first one once the time is up.
    at_least
        How many of them must be ready: see `RoundGrid.ready`.
    training
        Whether the round is for training; if so, nodes whose reply came late count as ready.
    timeout
        Seconds to wait at most.
    missing
        Returns the known clients that are not at any of these nodes.

    Raises
    ------
    QuorumError
        If there are too few nodes after `timeout`; the message names the clients that are missing.
    """
    deadline, seen = grid.clock.monotonic() + timeout, None
    while True:
        node_ids = list(grid.get_node_ids())
        able = set(grid.ready(node_ids, server_round, at_least, spare=training))
        ready = len(able | (grid.late_nodes() if training else set()))
        late = grid.clock.monotonic() >= deadline
        if ready >= at_least and len(node_ids) >= (enough if late or server_round > 1 else wanted):
            return node_ids
        if late:
            names = ", ".join(missing(node_ids)) or "nobody who answered before"
            raise QuorumError(
                f"expected {enough} nodes within {timeout:.0f} s, got {len(node_ids)}, {ready} of them ready. "
                f"Missing: {names}. Start more SuperNodes, or lower min_available_nodes or the quorum."
            )
        if (now := (len(node_ids), ready)) != seen:
            logger.info("Waiting for nodes, %.0f s at most: %d connected, %d of them ready.", timeout, *now)
            logger.info("Needed: %d connected, %d ready.", wanted if server_round == 1 else enough, at_least)
            seen = now
        grid.clock.sleep(min(1.0, timeout))


def choose(node_ids: Sequence[int], size: int, seed: str) -> list[int]:
    """Return `size` of the nodes, or all if there are fewer, in their order; order and seed decide which."""
    chosen = set(random.Random(seed).sample(node_ids, min(size, len(node_ids))))
    return [node_id for node_id in node_ids if node_id in chosen]
