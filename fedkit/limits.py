"""How long a round may last, how many answers it needs, and which nodes are left alone for a while."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from fedkit.errors import ConfigError, QuorumError

logger = logging.getLogger(__name__)

MAX_PAUSE: Final = 8  # rounds


@dataclass(frozen=True, slots=True)
class Limits:
    """When a round ends, how many replies it needs, and what happens if it gets fewer.

    Parameters
    ----------
    quorum : float
        Share of the nodes asked that must answer, 0 to 1; at least one must.
    grace : float, optional
        Seconds to wait for the others once there is a quorum; unset: until the deadline.
    deadline : float, optional
        Seconds that a round's messages are good for; Flower's `timeout` of `start` if unset.
    late : {"use", "discard"}
        Whether a reply that came after its round ended, but before its deadline, counts in the round it comes in.
    below_quorum : {"keep", "error"}
        Whether a round with too few replies leaves the model as it is, or ends the run.
    """

    quorum: float = 0.0
    grace: float | None = None
    deadline: float | None = None
    late: Literal["use", "discard"] = "use"
    below_quorum: Literal["keep", "error"] = "keep"

    def __post_init__(self) -> None:
        if not 0 <= self.quorum <= 1:
            raise ConfigError(f"quorum: expected a share, 0 to 1, got {self.quorum}.")
        if self.grace is not None and not self.grace >= 0:
            raise ConfigError(f"grace: expected at least 0 seconds, got {self.grace}.")
        if self.deadline is not None and not self.deadline > 0:
            raise ConfigError(f"deadline: expected more than 0 seconds, got {self.deadline}.")
        if self.late not in ("use", "discard"):
            raise ConfigError(f"late: expected 'use' or 'discard', got {self.late!r}.")
        if self.below_quorum not in ("keep", "error"):
            raise ConfigError(f"below_quorum: expected 'keep' or 'error', got {self.below_quorum!r}.")

    def needed(self, asked: int) -> int:
        """Return how many of the asked nodes must answer.

        >>> Limits(quorum=0.5).needed(5), Limits().needed(5)
        (3, 1)
        """
        return max(1, math.ceil(self.quorum * asked - 1e-9))

    def refuse(self, what: str) -> None:
        """Say that a round is below the quorum: in the log, or by an error that ends the run."""
        if self.below_quorum == "error":
            raise QuorumError(what)
        logger.warning("%s The model stays as it is.", what)


class Pauses:
    """Nodes that failed twice in a row, or more, rest for 1, 2, 4, then 8 rounds; an answer clears them."""

    def __init__(self) -> None:
        self._failures: dict[int, int] = {}  # consecutive failures, by node
        self._until: dict[int, int] = {}  # the next round, by node

    def choose(self, idle: Sequence[int], late: Collection[int], server_round: int, at_least: int) -> list[int]:
        """Return which of the idle nodes to ask in a round: those that are neither paused nor `late`.

        Paused nodes are included if there would otherwise be fewer than `at_least`, late answers counted. If there
        are no other nodes, those whose answer came late are asked, and these answers are dropped.
        """
        free = [node_id for node_id in idle if node_id not in late]
        rested = [node_id for node_id in free if self.over(node_id, server_round)]
        enough = len(rested) + len(idle) - len(free) >= at_least
        if idle and not free:
            logger.warning("round %d: nobody else is ready, so late answers are dropped.", server_round)
        return (rested if enough else free) or free or list(idle)

    def over(self, node_id: int, server_round: int) -> bool:
        """Return whether a node may be asked in a round."""
        return self._until.get(node_id, 0) <= server_round

    def fail(self, node_id: int, server_round: int) -> None:
        """Record a failure in a round."""
        count = self._failures[node_id] = self._failures.get(node_id, 0) + 1
        if count > 1:
            rounds = min(2 ** (count - 2), MAX_PAUSE)
            self._until[node_id] = server_round + 1 + rounds
            logger.warning("node %d failed %d times: it is not asked for %d round(s).", node_id, count, rounds)

    def clear(self, node_id: int) -> None:
        """Record an answer."""
        self._failures.pop(node_id, None)
        self._until.pop(node_id, None)


class Clock(Protocol):
    """The part of the module `time` that is used; tests provide their own."""

    def monotonic(self) -> float:
        """Return seconds since some fixed moment."""

    def sleep(self, seconds: float, /) -> None:
        """Wait."""
