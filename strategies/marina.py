"""MARINA: clients send quantized differences of successive updates; in random rounds, all send whole updates.

Symbols, source and deviations: `fedkit.aggregation.differences`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final

from flwr.app import ArrayRecord, Message, MetricRecord

from fedkit.aggregation.differences import Differences, Estimate
from fedkit.aggregation.protocol import StepSize
from fedkit.arrays import NamedArrays
from fedkit.checkpoint import Tree
from fedkit.codec.baselines import Qsgd
from fedkit.codec.protocol import Quantizer
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError, ReplyError
from fedkit.memory import GENESIS
from fedkit.message import Report

from .asking import Part
from .base import UpdateStrategy
from .composition import ROWS_MOVE

ESTIMATE: Final = (
    "its estimate contains what every client sent, and only a client's own difference updates its part."
)


class Marina(UpdateStrategy[Estimate]):
    """Differences of successive updates, from all clients. They need `fedkit.clients.AquilaMod`.

    Parameters
    ----------
    quantizer : Quantizer, optional
        Of the differences; unset: QSGD with 4 bits.
    whole : float
        The probability, above 0 to 1, that all clients send whole updates in a round, in float32.
    weighted : bool
        Whether clients are weighted by their number of examples.
    step_size : float or callable
        As in `Aquila`.
    **options
        As in `UpdateStrategy`; by default the downlink is dense.

    Raises
    ------
    ConfigError
        For impossible values, and if not all clients take part in every round.
    """

    scheme: ClassVar[str] = "aquila"  # AquilaMod handles MARINA, too
    refused: ClassVar[Mapping[str, str]] = {**UpdateStrategy.refused, "row_mask": ROWS_MOVE, "missing": ESTIMATE}
    state_types: ClassVar[tuple[type, ...]] = (Estimate,)

    def __init__(
        self,
        *,
        quantizer: Quantizer | None = None,
        whole: float = 0.1,
        weighted: bool = False,
        step_size: StepSize = 1.0,
        **options: Any,
    ) -> None:
        if not 0 < whole <= 1:
            raise ConfigError(f"whole: expected a chance above 0, to 1, got {whole}.")
        if options.get("fraction_train", 1.0) < 1:
            raise ConfigError("MARINA needs every client in every round: leave fraction_train at 1.")
        options.setdefault("downlink", None)
        aggregator = Differences(weighted, step_size)
        super().__init__(aggregator, Codec(quantizer or Qsgd(4)), step_size=step_size, **options)
        self.whole = whole

    def recall(self, params: NamedArrays, saved: Tree | None) -> None:
        """Restore what `remember` returned; a client that is not in the estimate waits for whole updates."""
        super().recall(params, saved)
        self.registry.accepted = dict(self.state.digests)

    def options(self, params: NamedArrays, part: Part) -> Mapping[str, Scalar]:
        """Return that updates are compared with the previous round's, and whether whole ones are sent."""
        return {"reference": "previous", "whole": self._all_whole(self._cohort.server_round)}

    def coding(self, server_round: int) -> Codec:
        """Return how uploads are coded; whole updates are sent in float32."""
        return Codec() if self._all_whole(server_round) else self.codec

    def check(self, node_id: int, report: Report) -> None:
        """Refuse a late upload if it is a difference while whole updates are wanted, or the other way round."""
        whole = self._all_whole(self._cohort.server_round)
        if not report.skipped and (report.base == GENESIS) != whole:
            raise ReplyError(
                f"it came too late: {'whole updates are' if whole else 'a difference is'} wanted now."
            )

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and metrics; a client that is not in the estimate has to wait."""
        result = super().aggregate_train(server_round, replies)
        self.registry.accepted = dict(self.state.digests)
        return result

    def _all_whole(self, server_round: int) -> bool:
        """Return whether all clients are to send whole updates: at random, and while there is no estimate."""
        chance = random.Random(f"{self.seed}/whole/{server_round}").random()
        return not self.registry.accepted or chance < self.whole
