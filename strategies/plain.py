"""FedAvg over coded updates, with nothing remembered between rounds on either side.

Clients send the update itself, quantized: what coding loses is lost. It goes with everything that changes what
arrays mean from round to round, as averaging the products of LoRA factors does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from flwr.app import ArrayRecord, Message, MetricRecord

from fedkit.aggregation.mean import Mean
from fedkit.aggregation.product import ProductMean
from fedkit.arrays import NamedArrays
from fedkit.codec.protocol import Quantizer
from fedkit.codec.wire import Codec
from fedkit.config import Scalar

from .asking import Part
from .base import UpdateStrategy
from .parts import LoraMode


class Plain(UpdateStrategy[None]):
    """Coded updates and their mean. Clients need `fedkit.clients.AquilaMod`.

    Parameters
    ----------
    quantizer : Quantizer, optional
        Of the updates; None: float32.
    weighted : bool
        Whether clients count by their number of examples.
    lora : {"factors", "ffa", "fedsa", "product"}
        How LoRA factors are averaged; "product" needs ``downlink=None``.
    gap : bool
        Whether to report how far LoRA factors are from the mean of the products, as the metric ``lora-gap``; with
        "product" it always is.
    **options
        As in `UpdateStrategy`.
    """

    scheme: ClassVar[str] = "aquila"  # whose mod starts anew when the server has nothing of it, and so always
    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        *,
        quantizer: Quantizer | None = None,
        weighted: bool = True,
        lora: LoraMode = "factors",
        gap: bool = False,
        **options: Any,
    ) -> None:
        aggregator = ProductMean(weighted) if lora == "product" else Mean(weighted, gap)
        super().__init__(aggregator, Codec(quantizer), lora=lora, **options)

    def options(self, params: NamedArrays, part: Part) -> Mapping[str, Scalar]:
        """Return that nobody skips."""
        return {"skip-threshold": 0.0}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and metrics, and forget what was sent."""
        result = super().aggregate_train(server_round, replies)
        self.registry.accepted.clear()
        return result
