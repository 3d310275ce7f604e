"""AQUILA: clients send the quantized innovation of their update, or nothing if it is small.

Z. Zhao, Y. Mao, Z. Shi, et al., "AQUILA: Communication Efficient Federated Learning with Adaptive
Quantization in Device Selection Strategy", IEEE TMC 23(6), 2024, https://arxiv.org/abs/2308.00258.

Symbols and deviations: `fedkit.codec.quantize` (the quantizer), `fedkit.aggregation.lazy` (the lazy sum) and
`fedkit.clients.aquila` (the skip rule).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Self

from flwr.app import ArrayRecord, Message, MetricRecord

from fedkit.aggregation.lazy import LazyMean, LazyState, LazySum, Memory, skip_threshold
from fedkit.arrays import NamedArrays
from fedkit.checkpoint import Tree
from fedkit.codec.protocol import Quantizer
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError

from .asking import Part
from .base import UpdateStrategy


class Aquila(UpdateStrategy[LazyState | LazySum]):
    """Lazily aggregated, adaptively quantized updates. Clients need `fedkit.clients.AquilaMod`.

    Parameters
    ----------
    beta : float
        How large an innovation may be, relative to the last step of the model, and still be skipped; 0: nobody
        skips.
    quantizer : Quantizer
        The default works with local training; `Aquila.published` has the paper's.
    weighted : bool
        Whether clients count by their number of examples.
    memory : {"each", "sum"}
        What the server remembers. "each": what every client sent, clients × parameters (in RAM, or in one file
        per client: `fedkit.aggregation.memories`); a client that lost its memory starts anew alone, and one that
        trains on more examples than before weighs more. "sum": their weighted sum, parameters only, however many
        clients; a client's weight stays that of its first upload, nobody can be taken out, and once a client that
        is in the sum has lost its memory, all start anew: each uploads against zeros, and until it has, counts
        for nothing. Meant for clients that keep their memory on disk.
    gap : bool
        Whether to report how far LoRA factors are from the mean of the products, as the metric ``lora-gap``
        (`fedkit.aggregation.lora`); with "each", and about the cost of another mean.
    **options
        As in `UpdateStrategy`.
    """

    scheme: ClassVar[str] = "aquila"
    aggregator: LazyMean

    def __init__(
        self,
        *,
        beta: float = 0.05,
        quantizer: Quantizer | None = None,
        weighted: bool = True,
        memory: Memory = "each",
        gap: bool = False,
        **options: Any,
    ) -> None:
        if not beta >= 0:
            raise ConfigError(f"beta must be at least 0, got {beta}.")
        super().__init__(LazyMean(weighted, memory, gap), Codec(quantizer or ZeroMidTread()), **options)
        if memory == "sum" and self.parts.differ:
            raise ConfigError("submodels: not with memory='sum', which does not say who holds what. Use 'each'.")
        self.beta = beta
        self._previous: NamedArrays | None = None

    @classmethod
    def published(cls, *, beta: float = 0.1, **options: Any) -> Self:
        """Return AQUILA as published: the grid without a zero, b* from 1 bit up, no weights, a dense downlink."""
        return cls(beta=beta, quantizer=AquilaMidTread(), weighted=False, **{"downlink": None, **options})

    def remember(self) -> Tree:
        """Return what the aggregator says, and the parameters before the last step."""
        previous = None if self._previous is None else dict(self._previous)
        return {"aggregation": self.aggregator.remember(self.state), "previous": previous}

    def recall(self, params: NamedArrays, saved: Tree | None) -> None:
        """Go on; a client whose file is lost starts anew."""
        saved, folder = saved or {"aggregation": {}, "previous": None}, self.progress.folder
        self.state = self.aggregator.recall(params, saved["aggregation"], folder and folder / "memories")
        self.registry.accepted, self._previous = dict(self.state.digests), saved["previous"]

    def options(self, params: NamedArrays, part: Part) -> Mapping[str, Scalar]:
        """Return the skip threshold, over what a node sends updates of."""
        previous = None if self._previous is None else part(self._previous)
        return {"skip-threshold": skip_threshold(self.beta, part(params), previous)}

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and metrics, and let start anew whoever is not in the memory any more."""
        result = super().aggregate_train(server_round, replies)
        self._previous = self._params  # for the next threshold
        self.registry.accepted = dict(self.state.digests)
        return result
