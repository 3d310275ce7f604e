"""Choosing nodes and building their messages, each with the frames that the node lacks and its instructions."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, Unpack

from flwr.app import ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedkit.aggregation.missing import Missing
from fedkit.aggregation.protocol import StepSize, step_at
from fedkit.arrays import NamedArrays, num_values
from fedkit.codec.names import to_text
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import QuorumError, ReplyError
from fedkit.ledger import Ledger
from fedkit.limits import Limits
from fedkit.message import LORA, STEP_SIZE, SUBMODEL, Instructions, Report, write_instructions
from fedkit.parcel import write_parcel
from fedkit.rounds import RoundGrid

from .border import Border
from .budget import Budget
from .composition import REMEMBERS, composed
from .contents import mean_metrics
from .downlink import Downlink
from .options import FedAvgOptions, check_names
from .parts import PRODUCTS, WHOLE, Parts
from .privacy import refuse_secure_aggregation
from .progress import Progress
from .registry import Registry
from .sampling import choose, wait_for_nodes

logger = logging.getLogger(__name__)

Part: TypeAlias = Callable[[NamedArrays], NamedArrays]
"""Cuts out of the server's arrays those entries that a node sends updates of, in the node's own units."""


class Asking(FedAvg):
    """The half of a strategy that chooses nodes and builds messages. Its options are those of `UpdateStrategy`."""

    scheme: ClassVar[str]
    one_for_all: ClassVar[bool] = True  # whether every node that holds the whole model is sent the same arrays
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(PRODUCTS, REMEMBERS)  # options, and why they are refused

    def __init__(
        self,
        codec: Codec,
        downlink: Downlink,
        parts: Parts,
        missing: Missing,
        *,
        step_size: StepSize,
        budget: Budget | None,
        limits: Limits | None,
        checkpoint: str | Path,
        seed: int,
        node_timeout: float,
        **fedavg: Unpack[FedAvgOptions],
    ) -> None:
        check_names(type(self), fedavg)
        to_text(codec)  # what nodes would not know is refused at once
        fedavg.setdefault("train_metrics_aggr_fn", mean_metrics)
        fedavg.setdefault("evaluate_metrics_aggr_fn", mean_metrics)
        super().__init__(**fedavg)
        self.parts = parts
        self.missing = composed(self, missing, downlink, budget)
        step_at(step_size, 1)
        self.step_size = step_size
        self.codec, self.downlink, self.budget = codec, downlink, budget
        self.border = Border(alike=self.one_for_all and not parts.differ)
        self.seed, self.node_timeout = seed, node_timeout
        self.limits, self._own_limits = limits or Limits(), limits is not None
        self.num_rounds, self._timeout = 1, 3600.0
        self.started = self.wrapped = False  # by `start`; by another strategy, which calls everything but `start`
        self.ledger, self.registry = Ledger(), Registry(parts.name_of)
        self.progress = Progress(Path(checkpoint) if str(checkpoint) else None)
        self._params: NamedArrays = {}

    initialize_parameters = refuse_secure_aggregation

    def summary(self) -> None:
        """Log the settings; called by Flower before the first round, and by strategies that wrap this one."""
        self.wrapped = not self.started
        logger.info("\t├──> %s, codec: %s", type(self).__name__, self.codec.quantizer or "float32")
        super().summary()

    def distribute(self, params: NamedArrays, node_ids: Sequence[int]) -> Mapping[int, NamedArrays]:
        """Return what each node is sent: its part of the model, or the same for all if they hold the whole."""
        return self.parts.distribute(params, node_ids, self.registry.submodels)

    def options(self, params: NamedArrays, part: Part) -> Mapping[str, Scalar]:
        """Return what this scheme's mod is told in this round; `part` cuts out what a node sends updates of."""
        return {}

    def coding(self, server_round: int) -> Codec:
        """Return how uploads of a round are coded unless the budget changes it; by default always the same."""
        return self.codec

    def check(self, node_id: int, report: Report) -> None:
        """Raise ReplyError for a report that the scheme cannot use; by default, never."""

    def _adopt(self, grid: Grid, timeout: float) -> RoundGrid:
        grid = grid if isinstance(grid, RoundGrid) else RoundGrid(grid)
        if self._own_limits:
            grid.limits = self.limits
        self.limits, self.ledger, self._timeout = grid.limits, grid.ledger, timeout
        return grid

    def _sample(
        self, grid: RoundGrid, server_round: int, fraction: float, minimum: int, kind: str, *, must: bool = False
    ) -> list[int]:
        """Return the nodes to ask, by client id; none if there are too few and the limits let the model stay.

        With `must`, too few nodes are an error in any case. The nodes that evaluate are drawn independently of
        those that train.
        """
        training = kind == MessageType.TRAIN
        if fraction == 0:
            return []
        needed = max(self.min_available_nodes, minimum)
        try:
            node_ids = wait_for_nodes(
                grid,
                server_round,
                wanted=needed,
                enough=self.limits.needed(needed) if self.limits.quorum else needed,
                at_least=self.limits.needed(minimum),
                training=training,
                timeout=self.node_timeout,
                missing=self.registry.absent,
            )
        except QuorumError as error:
            if must:
                raise
            self.limits.refuse(str(error))
            return []
        self.registry.alive = set(node_ids) - (grid.owing() - grid.late_nodes())
        size = max(int(len(node_ids) * fraction), minimum)
        self._introduce(grid, node_ids, server_round, sampling=size < len(node_ids))
        ready = grid.ready(node_ids, server_round, self.limits.needed(size), spare=training)
        ready = self.parts.names(ready, self.registry.submodels)
        ready.sort(key=self.registry.order)
        seed = f"{self.seed}/{server_round}"
        return choose(ready, size, seed if training else f"{seed}/{kind}")

    def _introduce(self, grid: RoundGrid, node_ids: Sequence[int], server_round: int, *, sampling: bool) -> None:
        """Ask unknown nodes which client they are, if that matters.

        It matters if only some of the nodes are asked, since they are chosen by client; if nodes hold different
        parts of the model or rows of their own; if the run was resumed; and if a known client is missing, since an
        unknown node may be that client.
        """
        unknown = [
            node_id
            for node_id in grid.ready(node_ids, server_round)
            if not self.registry.knows(node_id) or self.parts.unknown(node_id, self.registry.submodels)
        ]
        matters = sampling or self.progress.before or self.registry.absent(node_ids) or self.parts.by_client
        if not unknown or not matters:
            return
        messages = []
        for node_id in unknown:
            config = ConfigRecord()
            write_instructions(config, self._instructions(server_round, node_id, self.codec, introduce=True))
            messages.append(self._message(RecordDict({self.configrecord_key: config}), node_id, MessageType.TRAIN))
        for reply in grid.ask(messages, timeout=self._timeout):
            with suppress(ReplyError):
                self.registry.introduce(reply)

    def _messages(
        self, kind: str, server_round: int, config: ConfigRecord, sent: Mapping[int, NamedArrays]
    ) -> list[Message]:
        """Return a fresh message for each node."""
        messages = []
        known: dict[str, Mapping[str, Scalar]] = {}  # options by part, so that each is computed once
        if kind == MessageType.TRAIN:
            self.ledger.whole(server_round, sum(map(num_values, sent.values())))
        size = float(step_at(self.step_size, server_round))
        if size != 1:
            config = ConfigRecord({**config, STEP_SIZE: size})  # for the app
        parcels = list(self.downlink.parcels(sent, self.registry.versions))
        codecs = self._codecs(server_round, {node_id: sum(map(len, p.frames)) for node_id, p, _ in parcels})
        for node_id, parcel, bits in parcels:
            if node_id not in codecs:
                continue
            self.ledger.ideal(node_id, "downlink", bits)
            options = self._options_of(node_id, known)
            if kind == MessageType.TRAIN:
                options = {**options, **self.parts.rows.options(node_id)}
            if size != 1:
                options = {**options, STEP_SIZE: size}  # for the mod
            own, codec = ConfigRecord({**config, **self.parts.told(node_id).config}), codecs[node_id]
            write_instructions(own, self._instructions(server_round, node_id, codec, options=options))
            content = RecordDict({self.configrecord_key: own})
            write_parcel(content, self.arrayrecord_key, own, parcel)
            messages.append(self._message(content, node_id, kind))
        return messages

    def _options_of(self, node_id: int, known: dict[str, Mapping[str, Scalar]]) -> Mapping[str, Scalar]:
        name = self.parts.sent.get(node_id, WHOLE)
        if name not in known:
            known[name] = self.options(self._params, partial(self.parts.uploaded, node_id=node_id))
            if self.parts.lora in ("ffa", "fedsa"):
                known[name] = {**known[name], LORA: self.parts.lora}
            if name != WHOLE:
                known[name] = {**known[name], SUBMODEL: name}
        return known[name]

    def _note_training(self, server_round: int, metrics: MetricRecord) -> None:
        self.progress.note("train", server_round, metrics)
        self.ledger.trained(server_round, metrics)

    def _message(self, content: RecordDict, node_id: int, kind: str) -> Message:
        ttl = self.limits.deadline or self._timeout
        return Message(content, dst_node_id=node_id, message_type=kind, ttl=ttl)

    def _instructions(self, server_round: int, node_id: int, codec: Codec, **more: Any) -> Instructions:
        accepted = self.registry.told[node_id] = self.registry.accepted_from(node_id)
        experiment = self.progress.experiment
        return Instructions(
            self.scheme, server_round, codec, accepted, experiment=experiment, ordinary=self.border.packed, **more
        )

    def _codecs(self, server_round: int, down: Mapping[int, int]) -> Mapping[int, Codec]:
        """Return how each node that is asked codes its upload; `down` has the bytes to be sent to each node."""
        if self.budget is None:
            codec, told = self.coding(server_round), self.parts.told
            return {
                node_id: replace(codec, quantizer=told(node_id).quantizer or codec.quantizer) for node_id in down
            }
        return self.budget.codecs(
            self.coding(server_round),
            self.ledger,
            down=down,
            down_later=self.downlink.typical_bytes,
            num_values=self.parts.num_values(self._params),
            rounds_left=self.num_rounds - server_round + 1,
        )
