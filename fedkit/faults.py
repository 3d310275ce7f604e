"""A seeded schedule of what goes wrong, one value for the in-process grid, simulation and deployment.

A schedule is a function of its fields, the round and the client, and of nothing else: not of the order of calls,
the process or the machine. So a run can be repeated, and two runs can be compared under the same losses.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from fedkit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Faults:
    """Replies are lost independently of each other, with probability `drop`, or a client's own rate.

    Parameters
    ----------
    drop : float
        Probability that a reply is lost, 0 to 1.
    seed : int
        Of the draws.
    rates : Mapping[str, float]
        Probabilities of single clients, by client id, instead of `drop`.
    start_round : int
        The first round in which anything is lost.
    """

    drop: float = 0.0
    seed: int = 0
    rates: Mapping[str, float] = field(default_factory=dict)
    start_round: int = 1

    def __post_init__(self) -> None:
        for rate in (self.drop, *self.rates.values()):
            if not 0 <= rate <= 1:
                raise ConfigError(f"drop must be a probability, 0 to 1, got {rate}.")

    def loses(self, server_round: int, client_id: str) -> bool:
        """Return whether this client's reply of this round is lost.

        >>> Faults(drop=1.0).loses(3, "7"), Faults(drop=0.0).loses(3, "7")
        (True, False)
        """
        rate = self.rates.get(client_id, self.drop)
        if rate == 0 or server_round < self.start_round:
            return False
        rng = np.random.default_rng([self.seed, server_round, zlib.crc32(client_id.encode())])
        return bool(rng.random() < rate)
