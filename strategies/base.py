"""Flower's round in fedkit's words: send changes, judge replies one by one, fold the uploads.

A scheme is a subclass that names itself, its aggregation and its codec, and overrides one or two of the hooks
`distribute`, `options` and `expected`. Everything else is here: fresh messages per node, the acknowledgement of
uploads, errors of single nodes, weights, metrics and the ledger.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar, Unpack

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

from fedkit.aggregation.protocol import Aggregator, Cohort
from fedkit.arrays import NamedArrays, num_values
from fedkit.broadcast import ALL_NONZERO, TWO_BITS
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError, ReplyError
from fedkit.ledger import Ledger
from fedkit.message import (
    Instructions,
    Report,
    from_arrays,
    to_arrays,
    write_instructions,
    write_parcel,
)
from fedkit.rounds import RoundGrid

from .budget import Budget
from .downlink import Downlink
from .options import FedAvgOptions
from .replies import Inbox, Registry, mean_metrics, weight_of
from .sampling import sample_nodes

logger = logging.getLogger(__name__)

S = TypeVar("S")


class UpdateStrategy(FedAvg, Generic[S]):
    """A strategy whose clients send coded updates.

    Parameters
    ----------
    aggregator : Aggregator[S]
        Uploads to new parameters.
    codec : Codec
        How clients code what they send.
    downlink : Codec, optional
        How the server codes the change of the arrays; `evaluate_fn` and the result see the arrays that the clients
        rebuilt (`fedkit.broadcast`). None: all arrays are sent, in float32, every time.
    initial : Codec
        How the initial arrays are coded, once for each client; by default without loss.
    budget : Budget, optional
        How many bytes may travel; no limit if unset.
    seed : int
        Of the choice of clients, when not all take part.
    node_timeout : float
        Seconds to wait for `min_available_nodes` before a round.
    **fedavg
        As in Flower's FedAvg.
    """

    scheme: ClassVar[str]
    one_for_all: ClassVar[bool] = True  # whether every node is sent the same arrays
    state: S  # what the aggregator remembers, from the first round on

    def __init__(
        self,
        aggregator: Aggregator[S],
        codec: Codec,
        *,
        downlink: Codec | None = TWO_BITS,
        initial: Codec = ALL_NONZERO,
        budget: Budget | None = None,
        seed: int = 0,
        node_timeout: float = 600.0,
        **fedavg: Unpack[FedAvgOptions],
    ) -> None:
        fedavg.setdefault("train_metrics_aggr_fn", mean_metrics)
        fedavg.setdefault("evaluate_metrics_aggr_fn", mean_metrics)
        super().__init__(**fedavg)
        if downlink is not None and not self.one_for_all:
            raise ConfigError(f"downlink: {type(self).__name__} sends each node other arrays. Leave it unset.")
        self.aggregator, self.codec, self.seed, self.node_timeout = aggregator, codec, seed, node_timeout
        self.downlink = Downlink(downlink, initial, seed)
        self.num_rounds, self.budget = 1, budget
        self.ledger, self.registry = Ledger(), Registry()
        self._params: NamedArrays = {}
        self._cohort = Cohort(0, {})

    # ---- what a scheme may override ------------------------------------------------------------

    def distribute(self, params: NamedArrays, node_ids: Sequence[int]) -> Mapping[int, NamedArrays]:
        """Return what each node is sent; here everybody the same."""
        return dict.fromkeys(node_ids, params)

    def options(self, params: NamedArrays) -> Mapping[str, Scalar]:
        """Return what this scheme's mod must be told this round."""
        return {}

    def expected(self, sent: NamedArrays, report: Report) -> NamedArrays:
        """Return arrays with the names and shapes of an upload; here those of what was sent."""
        return sent

    # ---- Flower's round ------------------------------------------------------------------------

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, *args: Any, **kwargs: Any
    ) -> Result:
        """Run all rounds; see Flower's `Strategy.start`."""
        self.num_rounds = num_rounds
        grid = grid if isinstance(grid, RoundGrid) else RoundGrid(grid)
        self.ledger = grid.ledger
        params = self.downlink.begin(to_arrays(initial_arrays))
        return super().start(grid, from_arrays(params), num_rounds, *args, **kwargs)

    def summary(self) -> None:
        """Log the settings."""
        logger.info("\t├──> %s, codec: %s", type(self).__name__, self.codec.quantizer or "float32")
        super().summary()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return one message for each node of this round's cohort."""
        first, self._params = not self._params, to_arrays(arrays)
        if first:
            self.state = self.aggregator.init(self._params)
        node_ids = self._sample(grid, server_round, self.fraction_train, self.min_train_nodes)
        sent = self.distribute(self._params, node_ids)
        self._cohort = Cohort(server_round, sent, self.registry.names(node_ids))
        return self._messages(MessageType.TRAIN, server_round, config, self._cohort.sent)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and the mean of the clients' metrics; (None, None) if nobody answered."""
        inbox = Inbox(self.registry, self.ledger, self._cohort, self.weighted_by_key)
        judged = inbox.judge(replies)
        if not judged:
            return None, None
        contents: list[RecordDict] = []
        uploads = inbox.uploads(judged, self.expected, contents)
        params, self.state, metrics = self.aggregator(self._params, self._cohort, uploads, self.state)
        params = self.downlink.advance(params, server_round)
        record = self.train_metrics_aggr_fn(contents, self.weighted_by_key) if contents else MetricRecord()
        record.update(metrics)
        return from_arrays(params), record

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> list[Message]:
        """Return one message for each node that is to evaluate the arrays."""
        params = to_arrays(arrays)
        node_ids = self._sample(grid, server_round, self.fraction_evaluate, self.min_evaluate_nodes)
        return self._messages(
            MessageType.EVALUATE, server_round, config, self.distribute(params, node_ids) if node_ids else {}
        )

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the mean of the clients' metrics, None if there are none."""
        contents = []
        for reply in replies:
            try:
                self.registry.read_version(reply)
                weight_of(reply, self.weighted_by_key)
            except ReplyError as error:
                logger.warning("node %d, evaluation: %s", reply.metadata.src_node_id, error)
            else:
                contents.append(reply.content)
        return self.evaluate_metrics_aggr_fn(contents, self.weighted_by_key) if contents else None

    # ---- one node at a time --------------------------------------------------------------------

    def _sample(self, grid: Grid, server_round: int, fraction: float, minimum: int) -> list[int]:
        return sample_nodes(
            grid,
            fraction=fraction,
            minimum=minimum,
            available=self.min_available_nodes,
            timeout=self.node_timeout,
            order=self.registry.order,
            seed=f"{self.seed}/{server_round}",
        )

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
            accepted = self.registry.accepted_from(node_id)
            write_instructions(own, Instructions(self.scheme, server_round, codecs[node_id], accepted, options))
            content = RecordDict({self.configrecord_key: own})
            write_parcel(content, self.arrayrecord_key, own, parcel)
            messages.append(Message(content, dst_node_id=node_id, message_type=kind))
        return messages

    def _codecs(self, server_round: int, down: Mapping[int, int]) -> Mapping[int, Codec]:
        """Return how each node that is asked codes its upload; `down`: bytes that nodes are to be sent."""
        if self.budget is None:
            return dict.fromkeys(down, self.codec)
        return self.budget.codecs(
            self.codec,
            self.ledger,
            down=down,
            down_later=self.downlink.typical_bytes,
            num_values=num_values(self._params),
            rounds_left=self.num_rounds - server_round + 1,
        )
