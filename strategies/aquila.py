"""AQUILA: clients send the quantized innovation of their update, or nothing if it is small; and its baselines.

Z. Zhao, Y. Mao, Z. Shi, et al., "AQUILA: Communication Efficient Federated Learning with Adaptive
Quantization in Device Selection Strategy", IEEE TMC 23(6), 2024, https://arxiv.org/abs/2308.00258.

Symbols and deviations: `fedkit.codec.quantize` (the quantizer), `fedkit.skipping` (the skip rule),
`fedkit.aggregation.lazy` (the lazy sum) and `fedkit.clients.aquila` (what is sent).

The paper's baselines are options of the same strategy, for side-by-side runs. LENA is not among them: no source of
its rule could be read.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid

from fedkit.aggregation.differences import Differences, Estimate
from fedkit.aggregation.lazy import LazyMean, Memory
from fedkit.aggregation.mean import Mean
from fedkit.aggregation.protocol import StepSize, step_at
from fedkit.arrays import NamedArrays, squared_norm, subtract
from fedkit.checkpoint import Tree
from fedkit.codec.baselines import Qsgd
from fedkit.codec.protocol import Quantizer
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError
from fedkit.message import to_arrays
from fedkit.skipping import SkipRule

from .base import UpdateStrategy
from .loss_levels import LossLevels


class Aquila(UpdateStrategy[Any]):
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
    step_size : float or callable
        α, or the function from the round to it: what an update is divided by on the client, and the mean
        multiplied by on the server. The app finds it as ``step-size`` in its config; with one step of SGD of that
        length what travels is the gradient, as published. At 1, the default, it is the update itself; any
        other constant makes no difference, a schedule does.
    rule : SkipRule, optional
        When clients skip, instead of AQUILA's rule with `beta`.
    reference : {"accepted", "nothing", "previous"}
        What an update is compared with: `fedkit.clients.aquila` has the meanings.
    levels : LossLevels, optional
        Makes the quantizer finer as the clients' loss falls.
    whole : float
        With "previous": the chance that all clients send whole updates in a round.
    **options
        As in `UpdateStrategy`.

    Raises
    ------
    ConfigError
        For impossible values, and combinations.
    """

    scheme: ClassVar[str] = "aquila"
    state_types: ClassVar[tuple[type, ...]] = (Estimate,)

    def __init__(
        self,
        *,
        beta: float = 0.05,
        quantizer: Quantizer | None = None,
        weighted: bool = True,
        memory: Memory = "each",
        step_size: StepSize = 1.0,
        rule: SkipRule | None = None,
        reference: Literal["accepted", "nothing", "previous"] = "accepted",
        levels: LossLevels | None = None,
        whole: float = 0.1,
        **options: Any,
    ) -> None:
        aggregator: LazyMean | Mean | Differences
        if reference == "accepted":
            aggregator = LazyMean(weighted, memory, step_size)
        elif reference == "nothing":
            aggregator = Mean(weighted, step_size)
        elif reference == "previous":
            aggregator = Differences(weighted, step_size)
            if options.get("fraction_train", 1.0) < 1:
                raise ConfigError("reference 'previous' needs every client in every round: leave fraction_train.")
        else:
            raise ConfigError(f"reference: expected 'accepted', 'nothing' or 'previous', got {reference!r}.")
        step_at(step_size, 1)
        if not 0 < whole <= 1:
            raise ConfigError(f"whole: expected a chance above 0, to 1, got {whole}.")
        super().__init__(aggregator, Codec(quantizer or ZeroMidTread()), **options)
        self.rule, self.reference, self.levels, self.whole = (
            rule or SkipRule.aquila(beta),
            reference,
            levels,
            whole,
        )
        self.step_size = step_size
        self._previous: NamedArrays | None = None  # the arrays of the round before
        self._steps: list[float] = []  # ‖θ^k − θ^{k−1}‖²/α² of the rounds before, the latest first
        self._losses: list[float] = []  # the first round's, and the last's
        if levels is not None:
            levels.codec(self.codec, 1.0, 1.0)

    # ---- forms ---------------------------------------------------------------------------------

    @classmethod
    def published(cls, *, beta: float = 0.1, **options: Any) -> Self:
        """Return AQUILA as published: the grid without a zero, b* from 1 bit up, no weights, a dense downlink."""
        return cls(beta=beta, **_published(AquilaMidTread(), options))

    @classmethod
    def qsgd(cls, bits: int = 4, **options: Any) -> Self:
        """Return QSGD: the quantized update itself, at `bits` with the sign, every time."""
        return cls(reference="nothing", **_published(Qsgd(bits), options))

    @classmethod
    def laq(cls, bits: int = 8, *, rule: SkipRule | None = None, **options: Any) -> Self:
        """Return LAQ: innovations at a fixed width, and its own skip rule."""
        return cls(rule=rule or SkipRule.laq(), **_published(AquilaMidTread(bits, bits), options))

    @classmethod
    def adaquantfl(cls, start: float = 2.0, **options: Any) -> Self:
        """Return AdaQuantFL: QSGD whose levels, `start` at first, grow as the loss falls."""
        levels = LossLevels(start)
        return cls(reference="nothing", levels=levels, **_published(Qsgd(levels.bits(1.0, 1.0)), options))

    @classmethod
    def ladaq(cls, start: float = 2.0, *, rule: SkipRule | None = None, **options: Any) -> Self:
        """Return the paper's LAdaQ: LAQ with AdaQuantFL's levels."""
        levels = LossLevels(start)
        bits = levels.bits(1.0, 1.0)
        return cls(rule=rule or SkipRule.laq(), levels=levels, **_published(AquilaMidTread(bits, bits), options))

    @classmethod
    def marina(cls, bits: int = 4, *, whole: float = 0.1, **options: Any) -> Self:
        """Return MARINA: quantized differences of successive updates, or by chance whole ones, of all clients."""
        return cls(reference="previous", whole=whole, **_published(Qsgd(bits), options))

    # ---- what the strategy remembers -----------------------------------------------------------

    def remember(self) -> Tree:
        """Return what the aggregator says, and what the skip rule and the levels need."""
        lazy = self.aggregator if isinstance(self.aggregator, LazyMean) else None
        return {
            "aggregation": lazy.remember(self.state) if lazy else self.state,
            "previous": None if self._previous is None else dict(self._previous),
            "steps": self._steps,
            "losses": self._losses,
        }

    def recall(self, params: NamedArrays, saved: Tree | None) -> None:
        """Go on; a client whose file is lost starts anew."""
        saved = saved or {"aggregation": None, "previous": None, "steps": [], "losses": []}
        found, folder = saved["aggregation"], self.progress.folder
        if isinstance(self.aggregator, LazyMean):
            self.state = self.aggregator.recall(params, found or {}, folder and folder / "memories")
        else:
            self.state = self.aggregator.init(params) if found is None else found
        self._forget_others()
        self._previous, self._steps, self._losses = saved["previous"], saved["steps"], saved["losses"]

    def _forget_others(self) -> None:
        """Let start anew whoever is not in the memory any more."""
        self.registry.accepted = {} if self.state is None else dict(self.state.digests)

    # ---- Flower's round ------------------------------------------------------------------------

    def options(self, params: NamedArrays) -> Mapping[str, Scalar]:
        """Return what clients compare with, when they skip, and the step size; the defaults say nothing."""
        options: dict[str, Scalar] = {}
        size = float(step_at(self.step_size, self._cohort.server_round))
        if size != 1:
            options["step-size"] = size
        if self.reference == "accepted":
            return options | self.rule.to_options(self._steps)
        options["reference"] = self.reference
        if self._all_whole():
            options["whole"] = True
        return options

    def coding(self, server_round: int) -> Codec:
        """Return how uploads are coded: with the round's levels, or whole."""
        if self._all_whole():
            return Codec()
        return self.codec if not self.levels or not self._losses else self.levels.codec(self.codec, *self._losses)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return one message for each node of this round's cohort."""
        now, params = server_round + self.progress.before, to_arrays(arrays)
        if self._previous is not None:  # the step size that counts is that of the round that made the step
            step = squared_norm(subtract(params, self._previous)) / float(step_at(self.step_size, now - 1)) ** 2
            self._steps = [step, *self._steps][: len(self.rule.weights)]
        size = float(step_at(self.step_size, now))
        if size != 1:
            config = ConfigRecord({**config, "step-size": size})
        messages = super().configure_train(server_round, arrays, config, grid)
        self._previous = params
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and metrics, and let start anew whoever is not in the memory any more."""
        arrays, metrics = super().aggregate_train(server_round, replies)
        self._forget_others()
        loss = metrics.get(self.levels.metric) if self.levels and metrics else None
        if isinstance(loss, int | float):
            self._losses = [*self._losses[:1], float(loss)] if self._losses else [float(loss)] * 2
        return arrays, metrics

    def _all_whole(self) -> bool:
        """Return whether all clients are to send whole updates: by chance, and while there is no estimate."""
        if self.reference != "previous":
            return False
        server_round = self._cohort.server_round
        return (
            not self.registry.accepted or random.Random(f"{self.seed}/whole/{server_round}").random() < self.whole
        )


def _published(quantizer: Quantizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a published form: what they have in common, and what the user says."""
    return {"quantizer": quantizer, "weighted": False, "downlink": None, **options}
