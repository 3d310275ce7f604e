"""Hard limits on bytes: the rate is lowered in time, and a client that could exceed a limit is no longer asked."""

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

ENVELOPE: Final = 4096  # bytes reserved for a message besides its frames, before any message was measured
SLACK: Final = 1.06  # how many times as large as its rate says a frame may turn out
SLACK_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits on the bytes of all messages, uplink and downlink together, as the ledger counts them.

    If a run would need more, the rate of its uploads is lowered, evenly over the rounds that are left, provided
    that its quantizer is `EntropyConstrained`. A client that could exceed the limit even so is no longer asked;
    the log says so.

    Parameters
    ----------
    client_bytes : int, optional
        Limit of each client; no limit if unset.
    run_bytes : int, optional
        Limit of all clients together; no limit if unset.
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
        """Return the codec of each node that may be asked in this round.

        Parameters
        ----------
        codec : Codec
            Used for uploads if the budget allows it.
        ledger : Ledger
            Has the bytes spent so far.
        down : mapping of int to int
            Bytes of the frames that each node is sent in this round.
        down_later : int
            Approximate bytes of the frames that a node is sent in a later round.
        num_values : int
            Number of entries of an update.
        rounds_left : int
            Rounds that are left, this one included.
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
    """Return a codec whose upload fits `evenly` bytes, or, at the lowest rate, `here`; None if none does."""
    if not isinstance(codec.quantizer, EntropyConstrained):
        return codec if here >= (last or 4 * num_values) * SLACK + SLACK_BYTES else None
    rate = 8 * ((evenly - SLACK_BYTES) / SLACK) / num_values
    if rate >= codec.quantizer.rate:
        return codec
    lowest = MIN_RATE * num_values / 8 * SLACK + SLACK_BYTES
    return replace(codec, quantizer=EntropyConstrained(max(rate, MIN_RATE))) if here >= lowest else None
