"""A seeded schedule of what goes wrong, one value for the in-process grid, simulation and deployment.

A schedule is a function of its fields, the round and the client, and of nothing else: not of the order of calls,
the process or the machine. So a run can be repeated, and two runs can be compared under the same losses.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from fedkit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Faults:
    """Every reply is lost independently with probability `drop`."""

    drop: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ConfigError(f"drop must be a probability, 0 to 1, got {self.drop}.")

    def loses(self, server_round: int, client_id: str) -> bool:
        """Return whether this client's reply of this round is lost.

        >>> Faults(drop=1.0).loses(3, "7"), Faults(drop=0.0).loses(3, "7")
        (True, False)
        """
        if self.drop == 0:
            return False
        rng = np.random.default_rng([self.seed, server_round, zlib.crc32(client_id.encode())])
        return bool(rng.random() < self.drop)
