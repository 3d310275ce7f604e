"""The base of all strategies: a Flower round that sends coded changes, checks each reply and aggregates uploads.

A scheme is a subclass that sets its name, its aggregator and its codec, and overrides one or two of the hooks
`distribute`, `options` and `expected`. Everything else is here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, Unpack

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedkit.aggregation.compensate import compensated
from fedkit.aggregation.missing import Choice, Missing
from fedkit.aggregation.protocol import Aggregator, Cohort, Remembering, StepSize
from fedkit.arrays import NamedArrays
from fedkit.broadcast import ALL_NONZERO, TWO_BITS
from fedkit.checkpoint import Tree
from fedkit.codec.wire import Codec
from fedkit.ledger import EvaluateFn
from fedkit.limits import Limits
from fedkit.message import Report
from fedkit.row_masks import RowMask
from fedkit.submodels import Cut

from .asking import Asking
from .budget import Budget
from .downlink import Downlink
from .options import FedAvgOptions
from .parts import LoraMode, Parts
from .privacy import check_wrapped
from .progress import alone
from .replies import Inbox

S = TypeVar("S")


class UpdateStrategy(Asking, Generic[S]):
    """Base class of the strategies whose clients send coded updates.

    Parameters
    ----------
    aggregator : Aggregator[S]
        Turns the uploads of a round into new parameters.
    codec : Codec
        How clients encode their uploads.
    submodels : mapping of str to Cut, optional
        The part of the model that a node holds, by the name in its node config (``submodel="r4"``) or by its
        profile: `fedkit.submodels`; with `Terms`, its bits and run config, too. Parts need ``downlink=None``.
    lora : {"factors", "ffa", "fedsa", "product", "product-update"}
        How LoRA factors are averaged: see `fedkit.strategies.parts.LoraMode`.
    missing : {"drop", "reweight", "mifa", "safari"} or Missing
        How clients that did not answer count in the mean: `fedkit.aggregation.missing`.
    row_mask : RowMask, optional
        Makes clients train and send only a few rows of the LoRA factors, others in each round: `fedkit.row_masks`.
    step_size : float or callable
        See `Aquila`; only for the schemes that document it.
    downlink : Codec, optional
        How the server encodes the changes of its arrays; `evaluate_fn` and the result see what the clients rebuild
        (`fedkit.broadcast`). None: all arrays are sent, in float32, every time.
    initial : Codec
        How the initial arrays are encoded, once for each client; lossless by default.
    budget : Budget, optional
        Limits on the bytes sent in both directions; no limit if unset.
    limits : Limits, optional
        Quorum, grace period and deadline of a round; those of the RoundGrid if unset.
    checkpoint : str or Path
        Folder where the run is saved after each round; `start` resumes a run that it finds there. Empty: none.
    seed : int
        Of the client sampling, when not all take part, and of the draws of rows.
    node_timeout : float
        Seconds to wait for `min_available_nodes` before the first round, or for the quorum before a later one.
    **fedavg
        Options of Flower's FedAvg.
    """

    parts_type: ClassVar[type[Parts]] = Parts
    state_types: ClassVar[tuple[type, ...]] = ()  # the dataclasses in `state`, needed to load a checkpoint
    state: S  # of the aggregator, from the first round on

    def __init__(
        self,
        aggregator: Aggregator[S],
        codec: Codec,
        *,
        submodels: Mapping[str, Cut] | None = None,
        lora: LoraMode = "factors",
        missing: Choice | Missing = "drop",
        row_mask: RowMask | None = None,
        step_size: StepSize = 1.0,
        downlink: Codec | None = TWO_BITS,
        initial: Codec = ALL_NONZERO,
        budget: Budget | None = None,
        limits: Limits | None = None,
        checkpoint: str | Path = "",
        seed: int = 0,
        node_timeout: float = 600.0,
        **fedavg: Unpack[FedAvgOptions],
    ) -> None:
        super().__init__(
            codec,
            Downlink(downlink, initial, seed),
            self.parts_type(submodels, lora, row_mask),
            Missing.of(missing),
            step_size=step_size,
            budget=budget,
            limits=limits,
            checkpoint=checkpoint,
            seed=seed,
            node_timeout=node_timeout,
            **fedavg,
        )
        self.aggregator: Aggregator[Any] = compensated(aggregator, self.missing)
        self._cohort = Cohort(0, {})
        self._unanswered: Mapping[int, NamedArrays] = {}  # what was sent to nodes whose reply may come late

    def expected(self, sent: NamedArrays, report: Report) -> NamedArrays:
        """Return arrays with the names and shapes of an upload; by default those of the node's part."""
        return self.parts.expected(sent, report)

    def remember(self) -> Tree:
        """Return plain values from which `recall` can restore the run; by default those that stand for `state`."""
        return of.remember(self.state) if isinstance(of := self.aggregator, Remembering) else self.state

    def recall(self, params: NamedArrays, saved: Tree | None) -> None:
        """Restore what `remember` returned; None: start a new run."""
        of, folder = self.aggregator, self.progress.folder
        if isinstance(of, Remembering):
            self.state = of.recall(params, saved or {}, folder and folder / "memories")
        else:
            self.state = of.init(params) if saved is None else saved

    @alone
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: EvaluateFn | None = None,
    ) -> Result:
        """Run all rounds, or those that are missing in the checkpoint; see Flower's `Strategy.start`.

        Raises
        ------
        StateError
            If the checkpoint cannot be read or written; raised before training if that is clear by then.
        ConfigError
            If the checkpoint belongs to another strategy or other arrays, or another server is using it.
        QuorumError
            If too few nodes take part; see `limits`.
        """
        grid, self.num_rounds, self.started = self._adopt(grid, timeout), num_rounds, True
        params = self.progress.resume(self, self.border.inward(initial_arrays), grid.ledger)
        if params is None:
            params = self.downlink.begin(self.border.inward(initial_arrays))
            self.parts.prepare(params)
            self._params = params
            self.recall(params, None)
            self.progress.save(self, 0, params, None)
        before = self.progress.before

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round == 0 and before:
                return None  # the initial arrays were evaluated before the run was resumed
            metrics = evaluate_fn(server_round + before, arrays) if evaluate_fn else None
            if server_round:
                self.progress.save(self, server_round + before, self.border.inward(arrays), metrics)
            else:
                self.progress.note("server", 0, metrics)
            return metrics

        wanted = evaluate if evaluate_fn or self.progress.folder else None
        begin, left = self.border.outward(params), max(0, num_rounds - before)
        result = super().start(grid, begin, left, timeout, train_config, evaluate_config, wanted)
        return self.progress.complete(result, begin)

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return one message for each node of this round's cohort."""
        check_wrapped(self, config)
        server_round += self.progress.before
        first, self._params = not self._params, self.border.inward(arrays)
        if first:
            self.recall(self._params, None)
        grid, must = self._adopt(grid, self._timeout), server_round == 1  # round 1 has no trained model to keep
        size, kind = (self.fraction_train, self.min_train_nodes), MessageType.TRAIN
        node_ids = self._sample(grid, server_round, *size, kind, must=must)
        owing = grid.owing()
        self._unanswered = {node_id: sent for node_id, sent in self._unanswered.items() if node_id in owing}
        sent = self.distribute(self._params, node_ids)
        names, everybody = self.registry.names(node_ids), self.fraction_train >= 1
        self._cohort = self.parts.cohort(Cohort(server_round, sent, names, everybody=everybody))
        self.parts.rows.draw(self.seed, self._cohort)
        return self._messages(kind, server_round, config, sent)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and the mean of the clients' metrics; (None, None) below the quorum."""
        server_round += self.progress.before
        asked, replies = len(self._cohort.sent), list(replies)
        cohort = self.parts.cohort(replace(self._cohort, sent={**self._unanswered, **self._cohort.sent}))
        self._unanswered = cohort.sent  # a node whose late reply was to an older message may still answer this one
        inbox = Inbox(self.registry, self.ledger, cohort, self._cohort.sent.keys(), self.weighted_by_key)
        judged = inbox.judge(replies, self.parts.check, self.border.check, self.check)
        if len(judged) < self.limits.needed(asked):
            if replies:
                self.limits.refuse(f"Round {server_round}: {len(judged)} of {asked} replies can be used.")
            inbox.tell()
            return None, None
        contents: list[RecordDict] = []
        uploads = self.parts.embedded(inbox.uploads(judged, self.expected, contents))
        step = self.aggregator(self._params, self.parts.whole(cohort), uploads, self.state)
        self.state = step.state
        inbox.tell(step.stand_ins)
        self.border.average(contents, self.weighted_by_key)
        params = self.downlink.advance(step.params, server_round)
        metrics = self.train_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None
        record = MetricRecord({**(metrics or {}), **step.metrics})
        self._note_training(server_round, record)
        return self.border.outward(params), record

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return one message for each node that is to evaluate the arrays."""
        server_round += self.progress.before
        params, grid = self.border.inward(arrays), self._adopt(grid, self._timeout)
        size, kind = (self.fraction_evaluate, self.min_evaluate_nodes), MessageType.EVALUATE
        node_ids = self._sample(grid, server_round, *size, kind)
        return self._messages(kind, server_round, config, self.distribute(params, node_ids) if node_ids else {})

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean of the clients' metrics, None if there are none."""
        server_round += self.progress.before
        contents = self.registry.readable(replies, self.weighted_by_key)
        metrics = self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None
        if metrics is not None:
            self.progress.note("evaluate", server_round, metrics)
            self.ledger.measure(server_round, metrics)
        return metrics
