"""Whom to ask, and with what message: one for each node, with the frames that it lacks and its instructions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Unpack

from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

from fedkit.arrays import NamedArrays, num_values
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import QuorumError, ReplyError
from fedkit.ledger import Ledger
from fedkit.limits import Limits
from fedkit.message import Instructions, write_instructions
from fedkit.parcel import write_parcel
from fedkit.rounds import RoundGrid

from .budget import Budget
from .downlink import Downlink
from .options import FedAvgOptions
from .progress import Progress
from .replies import Registry, mean_metrics
from .sampling import choose, wait_for_nodes


class Asking(FedAvg):
    """The half of a strategy that makes messages. Its options are those of `UpdateStrategy`."""

    scheme: ClassVar[str]

    def __init__(
        self,
        codec: Codec,
        downlink: Downlink,
        *,
        budget: Budget | None,
        limits: Limits | None,
        checkpoint: str | Path,
        seed: int,
        node_timeout: float,
        **fedavg: Unpack[FedAvgOptions],
    ) -> None:
        fedavg.setdefault("train_metrics_aggr_fn", mean_metrics)
        fedavg.setdefault("evaluate_metrics_aggr_fn", mean_metrics)
        super().__init__(**fedavg)
        self.codec, self.downlink, self.budget = codec, downlink, budget
        self.seed, self.node_timeout = seed, node_timeout
        self.limits, self._own_limits = limits or Limits(), limits is not None
        self.num_rounds, self._timeout = 1, 3600.0
        self.ledger, self.registry = Ledger(), Registry()
        self.progress = Progress(Path(checkpoint) if str(checkpoint) else None)
        self._params: NamedArrays = {}

    def options(self, params: NamedArrays) -> Mapping[str, Scalar]:
        """Return what this scheme's mod must be told this round."""
        return {}

    def coding(self, server_round: int) -> Codec:
        """Return how uploads of a round are coded, if the budget has nothing against it; here always the same."""
        return self.codec

    def _adopt(self, grid: Grid, timeout: float) -> RoundGrid:
        grid = grid if isinstance(grid, RoundGrid) else RoundGrid(grid)
        if self._own_limits:
            grid.limits = self.limits
        self.limits, self.ledger, self._timeout = grid.limits, grid.ledger, timeout
        return grid

    def _sample(
        self, grid: RoundGrid, server_round: int, fraction: float, minimum: int, *, must: bool = False
    ) -> list[int]:
        """Return the nodes to ask, by client id; none, if there are too few and the limits let the model stay.

        With `must`, too few are an error in any case.
        """
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
                timeout=self.node_timeout,
                missing=self.registry.absent,
            )
        except QuorumError as error:
            if must:
                raise
            self.limits.refuse(str(error))
            return []
        size = max(int(len(node_ids) * fraction), minimum)
        self._introduce(grid, node_ids, server_round, sampling=size < len(node_ids))
        ready = grid.ready(node_ids, server_round, self.limits.needed(size))
        ready.sort(key=self.registry.order)
        return choose(ready, size, f"{self.seed}/{server_round}")

    def _introduce(self, grid: RoundGrid, node_ids: Sequence[int], server_round: int, *, sampling: bool) -> None:
        """Ask nodes that are not known which client they are, where that matters.

        It does where some are chosen, by client; and where a known client is missing, which may have come back.
        """
        unknown = [node_id for node_id in grid.ready(node_ids, server_round) if not self.registry.knows(node_id)]
        if not unknown or not (sampling or self.progress.before or self.registry.absent(node_ids)):
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
        options = self.options(self._params)
        messages = []
        parcels = list(self.downlink.parcels(sent, self.registry.versions))
        codecs = self._codecs(server_round, {node_id: sum(map(len, p.frames)) for node_id, p, _ in parcels})
        for node_id, parcel, bits in parcels:
            if node_id not in codecs:
                continue
            self.ledger.ideal(node_id, "downlink", bits)
            own = ConfigRecord(dict(config))
            write_instructions(own, self._instructions(server_round, node_id, codecs[node_id], options=options))
            content = RecordDict({self.configrecord_key: own})
            write_parcel(content, self.arrayrecord_key, own, parcel)
            messages.append(self._message(content, node_id, kind))
        return messages

    def _message(self, content: RecordDict, node_id: int, kind: str) -> Message:
        ttl = self.limits.deadline or self._timeout
        return Message(content, dst_node_id=node_id, message_type=kind, ttl=ttl)

    def _instructions(self, server_round: int, node_id: int, codec: Codec, **more: Any) -> Instructions:
        accepted = self.registry.told[node_id] = self.registry.accepted_from(node_id)
        experiment = self.progress.experiment
        return Instructions(self.scheme, server_round, codec, accepted, experiment=experiment, **more)

    def _codecs(self, server_round: int, down: Mapping[int, int]) -> Mapping[int, Codec]:
        """Return how each node that is asked codes its upload; `down`: bytes that nodes are to be sent."""
        if self.budget is None:
            return dict.fromkeys(down, self.coding(server_round))
        return self.budget.codecs(
            self.coding(server_round),
            self.ledger,
            down=down,
            down_later=self.downlink.typical_bytes,
            num_values=num_values(self._params),
            rounds_left=self.num_rounds - server_round + 1,
        )
