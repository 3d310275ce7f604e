"""Hard limits on bytes: the rate is lowered in time, and who could exceed a limit is not asked any more."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

from fedkit.codec.entropy_constrained import MIN_RATE, EntropyConstrained
from fedkit.codec.wire import Codec
from fedkit.errors import ConfigError
from fedkit.ledger import Ledger

logger = logging.getLogger(__name__)

ENVELOPE: Final = 4096  # bytes of a message besides its frames that are kept free, until messages were seen
SLACK: Final = 1.06  # how much larger than its rate a frame may turn out
SLACK_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Budget:
    """How many bytes may travel in all, uplink and downlink, as the ledger counts them.

    A run that would need more lowers the rate of its uploads, evenly over the rounds that are left, if its
    quantizer is `EntropyConstrained`. A client that could exceed the limit even so is not asked any more; the log
    says so.

    Parameters
    ----------
    client_bytes : int, optional
        Of each client; no limit if unset.
    run_bytes : int, optional
        Of all clients together; no limit if unset.
    """

    client_bytes: int | None = None
    run_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, limit in (("client_bytes", self.client_bytes), ("run_bytes", self.run_bytes)):
            if limit is not None and limit < 1:
                raise ConfigError(f"{name}: expected at least 1 byte, got {limit}.")

    def codecs(
        self,
        codec: Codec,
        ledger: Ledger,
        *,
        down: Mapping[int, int],
        down_later: int,
        num_values: int,
        rounds_left: int,
    ) -> dict[int, Codec]:
        """Return the codec of each node that may be asked this round.

        Parameters
        ----------
        codec : Codec
            That uploads have if nothing stands against it.
        ledger : Ledger
            What was spent.
        down : mapping of int to int
            Bytes of the frames that each node is sent this round.
        down_later : int
            Bytes of the frames that it is sent in a later round, about.
        num_values : int
            Entries of an update.
        rounds_left : int
            This one included.
        """
        left = {node_id: self._left(ledger, node_id, len(down)) for node_id in down}
        envelope = 2 * ledger.envelope(ENVELOPE)
        chosen = {}
        for node_id, frames in down.items():
            here = left[node_id] - frames - envelope
            evenly = (here - (rounds_left - 1) * (down_later + envelope)) / rounds_left
            fitting = _fit(codec, evenly, here, num_values, ledger.last_upload(node_id))
            if fitting is None:
                logger.warning(
                    "budget: client %s has %d bytes left, too few for another round: it is not asked.",
                    ledger.client_of(node_id),
                    left[node_id],
                )
            else:
                chosen[node_id] = fitting
        return chosen

    def _left(self, ledger: Ledger, node_id: int, nodes: int) -> float:
        own = float("inf") if self.client_bytes is None else self.client_bytes - ledger.spent(node_id)
        everybody = float("inf") if self.run_bytes is None else (self.run_bytes - ledger.spent()) / nodes
        return min(own, everybody)


def _fit(codec: Codec, evenly: float, here: float, num_values: int, last: int) -> Codec | None:
    """Return the codec whose upload takes at most `evenly` bytes, or, at the lowest rate, `here`; None if none."""
    if not isinstance(codec.quantizer, EntropyConstrained):
        return codec if here >= (last or 4 * num_values) * SLACK + SLACK_BYTES else None
    rate = 8 * ((evenly - SLACK_BYTES) / SLACK) / num_values
    if rate >= codec.quantizer.rate:
        return codec
    lowest = MIN_RATE * num_values / 8 * SLACK + SLACK_BYTES
    return replace(codec, quantizer=EntropyConstrained(max(rate, MIN_RATE))) if here >= lowest else None
