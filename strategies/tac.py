"""FL-TAC: several tasks share one federation; clients send one adapter per task and never say which task it is.

S. Ping, Y. Mao, Y. Liu, X.-P. Zhang and W. Ding, "FL-TAC: Enhanced Fine-Tuning in Federated Learning via
Low-Rank, Task-Specific Adapter Clustering", ICLR 2024 Workshop on LLM Agents, https://arxiv.org/abs/2404.15384.

Symbols and deviations: `fedkit.aggregation.cluster`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from flwr.app import ArrayRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedkit.aggregation.cluster import ClusterMean, ClusterState
from fedkit.aggregation.slots import join_slots, replicate, split_clusters, split_slots
from fedkit.arrays import NamedArrays
from fedkit.codec.protocol import Quantizer
from fedkit.codec.wire import Codec
from fedkit.errors import ConfigError, ReplyError
from fedkit.message import Report
from fedkit.ordinary import split

from .base import UpdateStrategy
from .parts import PRODUCTS


class Tac(UpdateStrategy[ClusterState]):
    """One adapter per task, found by clustering. Clients need `fedkit.clients.TacMod`.

    The arrays that `start` and `evaluate_fn` see hold an adapter per cluster, ``cluster-0/NAME`` and so on
    (`fedkit.aggregation.slots`). Start from one plain adapter: every cluster begins with it.

    Parameters
    ----------
    num_clusters : int
        How many tasks there are over all clients.
    max_slots : int, optional
        How many adapters one client may send; as many as there are clusters if unset.
    quantizer : Quantizer
        Of the updates of the adapters; None: float32.
    distinct : bool
        Whether adapters of one client are for different tasks, and so never share a cluster.
    weighted : bool
        Whether clients count by their number of examples; each of a client's adapters counts alike.
    seed : int
        Of k-means, and of the choice of clients.
    **options
        As in `UpdateStrategy`.
    """

    scheme: ClassVar[str] = "tac"
    one_for_all: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("submodels", "row_mask", "missing", "ffa", "fedsa", *PRODUCTS),
        "adapters are told apart by comparing all of them, whole.",
    )
    state_types: ClassVar[tuple[type, ...]] = (ClusterState,)

    def __init__(
        self,
        *,
        num_clusters: int,
        max_slots: int | None = None,
        quantizer: Quantizer | None = None,
        distinct: bool = True,
        weighted: bool = False,
        seed: int = 0,
        **options: Any,
    ) -> None:
        options.setdefault("downlink", None)
        super().__init__(
            ClusterMean(num_clusters, distinct, weighted, seed), Codec(quantizer), seed=seed, **options
        )
        self.state = ClusterState()
        self.num_clusters = num_clusters
        self.max_slots = num_clusters if max_slots is None else max_slots
        if self.max_slots < 1:
            raise ConfigError(f"max_slots must be at least 1, got {max_slots}.")

    @classmethod
    def published(cls, **options: Any) -> Self:
        """Return FL-TAC as published: k-means alone says which adapters are for one task."""
        return cls(distinct=False, **options)

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, *args: Any, **kwargs: Any
    ) -> Result:
        """Run all rounds from one adapter, or from one per cluster; see Flower's `Strategy.start`."""
        adapter, ordinary = split(initial_arrays, ())
        params = ordinary.record(replicate(adapter, self.num_clusters))
        return super().start(grid, params, num_rounds, *args, **kwargs)

    def distribute(self, params: NamedArrays, node_ids: Sequence[int]) -> Mapping[int, NamedArrays]:
        """Return, for each slot of each node, the adapter of its cluster; v^0 for a node not known yet."""
        clusters = split_clusters(params)
        newcomer = join_slots([self.state.start])
        names, assignment = self.registry.names(node_ids), self.state.assignment
        return {
            node_id: join_slots([clusters[k] for k in assignment[names[node_id]]])
            if names.get(node_id) in assignment
            else newcomer
            for node_id in node_ids
        }

    def expected(self, sent: NamedArrays, report: Report) -> NamedArrays:
        """Return arrays with the names and shapes of all slots that the client says it has."""
        num_slots = report.options.get("num-slots")
        if type(num_slots) is not int or not 1 <= num_slots <= self.max_slots:
            raise ReplyError(f"num-slots: expected 1 to {self.max_slots}, got {num_slots!r}. See max_slots.")
        return join_slots(split_slots(sent, num_slots))
