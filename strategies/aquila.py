"""AQUILA: clients send the quantized innovation of their update, or skip it if it is small; also LAQ.

Z. Zhao, Y. Mao, Z. Shi, et al., "AQUILA: Communication Efficient Federated Learning with Adaptive
Quantization in Device Selection Strategy", IEEE TMC 23(6), 2024, https://arxiv.org/abs/2308.00258.

Symbols and deviations: `fedkit.codec.quantize` (the quantizer), `fedkit.skipping` (the skip rule),
`fedkit.aggregation.lazy` (the lazy sum) and `fedkit.clients.aquila` (what is sent).

The innovation is the difference between a client's update and what the server already has from that client. LAQ is
the method that AQUILA builds on. The paper's other baselines use the same mod: QSGD and AdaQuantFL are forms of
`Plain`, MARINA is `Marina`. LENA is not implemented, since no source of its rule could be read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Final, Literal, Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedkit.aggregation.lazy import LazyMean, LazyState, LazySum, Memory
from fedkit.aggregation.protocol import StepSize, step_at
from fedkit.arrays import NamedArrays, squared_norm, subtract
from fedkit.checkpoint import Tree
from fedkit.codec.protocol import Quantizer
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError
from fedkit.skipping import SkipRule

from .asking import Part
from .base import UpdateStrategy
from .composition import ROWS_MOVE

LAZY: Final = (
    "the step is along the sum of all uploads so far, in which a missing client must count like one that skips. "
    "Use Plain, ErrorFeedback or Safari."
)


class Aquila(UpdateStrategy[LazyState | LazySum]):
    """Lazily aggregated, adaptively quantized updates. Clients need `fedkit.clients.AquilaMod`.

    Parameters
    ----------
    beta : float
        How large an innovation may be, relative to the last step of the model, and still be skipped. Larger values
        save more uploads; 0: nobody skips.
    quantizer : Quantizer
        The default works with local training; `Aquila.published` has the paper's.
    weighted : bool
        Whether clients are weighted by their number of examples.
    memory : {"each", "sum"}
        What the server remembers.

        "each": what every client sent, which takes clients × parameters (in RAM, or in one file per client:
        `fedkit.aggregation.memories`). A client that lost its memory starts anew without affecting the others, and
        one that trains on more examples than before gets a larger weight.

        "sum": the weighted sum over the clients, which takes the parameters only, however many clients there are.
        A client's weight stays that of its first upload, and no client can be taken out. Once a client that is in
        the sum has lost its memory, all clients start anew: each uploads against zeros, and counts for nothing
        until it has. Meant for clients that keep their memory on disk.
    step_size : float or callable
        α, or a function from the round to α. Clients divide their update by it, and the server multiplies the mean
        by it. The app finds it as ``step-size`` in its config: if the app takes one SGD step of that length, the
        gradient is sent, as published. At 1, the default, the update itself is sent. Any other constant makes no
        difference; a schedule does.
    rule : SkipRule, optional
        When clients skip, instead of AQUILA's rule with `beta`.
    gap : bool
        Whether to report how far the product of the averaged LoRA factors is from the mean of the products, as the
        metric ``lora-gap`` (`fedkit.aggregation.lora`). Only with "each"; costs about as much as another mean.
    missing : {"mifa"}
        A missing client counts with what the server has from it, as one that skips does. No other value is
        possible: see `LAZY`.
    **options
        As in `UpdateStrategy`.

    Raises
    ------
    ConfigError
        For impossible values and combinations.
    """

    scheme: ClassVar[str] = "aquila"
    refused: ClassVar[Mapping[str, str]] = {**UpdateStrategy.refused, "row_mask": ROWS_MOVE}
    aggregator: LazyMean

    def __init__(
        self,
        *,
        beta: float = 0.05,
        quantizer: Quantizer | None = None,
        weighted: bool = True,
        memory: Memory = "each",
        step_size: StepSize = 1.0,
        rule: SkipRule | None = None,
        gap: bool = False,
        missing: Literal["mifa"] = "mifa",
        **options: Any,
    ) -> None:
        if missing != "mifa":
            raise ConfigError(f"missing: expected 'mifa' with Aquila, got {missing!r}: {LAZY}")
        aggregator = LazyMean(weighted, memory, step_size, gap)
        super().__init__(aggregator, Codec(quantizer or ZeroMidTread()), step_size=step_size, **options)
        self.rule = rule or SkipRule.aquila(beta)
        if self.parts.differ and memory == "sum":
            raise ConfigError("submodels: not with memory='sum', which does not say who holds what. Use 'each'.")
        if self.parts.differ and len(self.rule.weights) > 1:
            raise ConfigError("submodels: only with a rule of one step, as AQUILA's is.")
        self._previous: NamedArrays | None = None  # the arrays of the round before
        self._steps: list[float] = []  # ‖θ^k − θ^{k−1}‖²/α², the latest first

    @classmethod
    def published(cls, *, beta: float = 0.1, **options: Any) -> Self:
        """Return AQUILA as published: a grid without a zero, b* from 1 bit up, unweighted, a dense downlink."""
        form = {"quantizer": AquilaMidTread(), "weighted": False, "downlink": None}
        return cls(beta=beta, **{**form, **options})

    @classmethod
    def laq(cls, bits: int = 8, **options: Any) -> Self:
        """Return LAQ: innovations at a fixed number of bits, with LAQ's own skip rule."""
        form = {
            "quantizer": AquilaMidTread(bits, bits),
            "rule": SkipRule.laq(),
            "weighted": False,
            "downlink": None,
        }
        return cls(**{**form, **options})

    # ---- what the strategy remembers -----------------------------------------------------------

    def remember(self) -> Tree:
        """Return what the aggregator remembers, and what the skip rule needs."""
        previous = None if self._previous is None else dict(self._previous)
        return {"aggregation": self.aggregator.remember(self.state), "previous": previous, "steps": self._steps}

    def recall(self, params: NamedArrays, saved: Tree | None) -> None:
        """Restore what `remember` returned; a client whose file is lost starts anew."""
        saved = saved or {"aggregation": {}, "previous": None, "steps": []}
        folder = self.progress.folder
        self.state = self.aggregator.recall(params, saved["aggregation"], folder and folder / "memories")
        self.registry.accepted = dict(self.state.digests)
        self._previous, self._steps = saved["previous"], saved["steps"]

    # ---- Flower's round ------------------------------------------------------------------------

    def options(self, params: NamedArrays, part: Part) -> Mapping[str, Scalar]:
        """Return the rule by which a node skips, computed over the entries that it sends updates of."""
        if not self.parts.differ or self._previous is None:
            return self.rule.to_options(self._steps)
        return self.rule.to_options([self._step(self._cohort.server_round, part(params), part(self._previous))])

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return one message for each node of this round's cohort."""
        params = self.border.inward(arrays)
        if self._previous is not None:
            step = self._step(server_round + self.progress.before, params, self._previous)
            self._steps = [step, *self._steps][: len(self.rule.weights)]
        messages = super().configure_train(server_round, arrays, config, grid)
        self._previous = params
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and metrics; clients that are no longer in the memory start anew."""
        result = super().aggregate_train(server_round, replies)
        self.registry.accepted = dict(self.state.digests)
        return result

    def _step(self, server_round: int, params: NamedArrays, previous: NamedArrays) -> float:
        """Return ‖θ^k − θ^{k−1}‖²/α², with the α of the round before, which made that step."""
        return squared_norm(subtract(params, previous)) / float(step_at(self.step_size, server_round - 1)) ** 2
