"""FedAvg over coded updates; neither side remembers anything between rounds. QSGD and AdaQuantFL are forms of it.

Clients send the update itself, quantized; what the quantizer loses is not sent later. So it combines with options
that change what the arrays mean from round to round, such as averaging the products of LoRA factors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from flwr.app import ArrayRecord, Message, MetricRecord

from fedkit.aggregation.mean import Mean
from fedkit.aggregation.product import ProductMean
from fedkit.aggregation.protocol import StepSize
from fedkit.arrays import NamedArrays
from fedkit.checkpoint import Tree
from fedkit.codec.baselines import Qsgd
from fedkit.codec.protocol import Quantizer
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError

from .asking import Part
from .base import UpdateStrategy
from .loss_levels import LossLevels
from .parts import PRODUCTS, LoraMode


class Plain(UpdateStrategy[Any]):
    """FedAvg over coded updates. Clients need `fedkit.clients.AquilaMod`.

    Parameters
    ----------
    quantizer : Quantizer, optional
        Of the updates; None: float32.
    weighted : bool
        Whether clients are weighted by their number of examples.
    step_size : float or callable
        As in `Aquila`.
    levels : LossLevels, optional
        Makes the quantizer finer as the clients' loss falls.
    lora : {"factors", "ffa", "fedsa", "product", "product-update"}
        How LoRA factors are averaged; "product" and "product-update" need ``downlink=None``.
    gap : bool
        Whether to report how far the product of the averaged LoRA factors is from the mean of the products, as the
        metric ``lora-gap``. With "product" and "product-update" it is always reported.
    **options
        As in `UpdateStrategy`.

    Raises
    ------
    ConfigError
        For impossible values and combinations.
    """

    scheme: ClassVar[str] = "aquila"  # AquilaMod handles these updates, too
    refused: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        *,
        quantizer: Quantizer | None = None,
        weighted: bool = True,
        step_size: StepSize = 1.0,
        levels: LossLevels | None = None,
        lora: LoraMode = "factors",
        gap: bool = False,
        **options: Any,
    ) -> None:
        products = lora in PRODUCTS
        if products and step_size != 1.0:
            raise ConfigError(f"step_size: with lora={lora!r} there is no step, but a mean of models. Leave it.")
        aggregator = (
            ProductMean(weighted, lora == "product-update") if products else Mean(weighted, step_size, gap)
        )
        super().__init__(aggregator, Codec(quantizer), lora=lora, step_size=step_size, **options)
        self.levels = levels
        self._losses: list[float] = []  # of the first and of the latest round
        self.coding(1)

    @classmethod
    def qsgd(cls, bits: int = 4, **options: Any) -> Self:
        """Return QSGD: `bits` include the sign; unweighted, with a dense downlink."""
        return cls(**{"quantizer": Qsgd(bits), "weighted": False, "downlink": None, **options})

    @classmethod
    def adaquantfl(cls, start: float = 2.0, **options: Any) -> Self:
        """Return AdaQuantFL: QSGD with `start` levels at first, and more as the loss falls."""
        return cls.qsgd(**{"levels": LossLevels(start), **options})

    def remember(self) -> Tree:
        """Return the losses that the levels depend on, and what the aggregator remembers."""
        return {"losses": self._losses, "aggregation": super().remember()}

    def recall(self, params: NamedArrays, saved: Tree | None) -> None:
        """Restore what `remember` returned, so that the levels are those of that time."""
        super().recall(params, saved and saved["aggregation"])
        self._losses = saved["losses"] if saved else []

    def options(self, params: NamedArrays, part: Part) -> Mapping[str, Scalar]:
        """Return that updates are sent themselves, not compared with anything."""
        return {"reference": "nothing"}

    def coding(self, server_round: int) -> Codec:
        """Return how uploads are coded: with the levels that the loss calls for."""
        return self.levels.codec(self.codec, *(self._losses or (1.0, 1.0))) if self.levels else self.codec

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and metrics, and forget the digests of what was sent."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        self.registry.accepted.clear()
        loss = metrics.get(self.levels.metric) if self.levels and metrics else None
        if isinstance(loss, int | float):
            self._losses = [*(self._losses[:1] or [float(loss)]), float(loss)]
        return arrays, metrics
