"""FL-TAC: clients with several tasks send one adapter for each task, without saying which task it is for.

S. Ping, Y. Mao, Y. Liu, X.-P. Zhang and W. Ding, "FL-TAC: Enhanced Fine-Tuning in Federated Learning via
Low-Rank, Task-Specific Adapter Clustering", ICLR 2024 Workshop on LLM Agents, https://arxiv.org/abs/2404.15384.

Symbols and deviations: `fedkit.aggregation.cluster`; the rules of the clustering: `fedkit.aggregation.tasks`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, Self

from flwr.app import ArrayRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result

from fedkit.aggregation.cluster import Clustered, ClusterState
from fedkit.aggregation.evidence import ASKED, FEATURES, Evidence, features_from_text, slot_name
from fedkit.aggregation.identities import Assignment
from fedkit.aggregation.lazy import LazyMean
from fedkit.aggregation.mean import MaskedMean, Mean
from fedkit.aggregation.missing import Choice, Missing
from fedkit.aggregation.product import ProductMean
from fedkit.aggregation.protocol import Aggregator
from fedkit.aggregation.signatures import Signature
from fedkit.aggregation.slots import join_slots, replicate, split_clusters, split_slots
from fedkit.aggregation.tasks import Number, Tasks
from fedkit.arrays import NamedArrays, squared_norm, subtract
from fedkit.checkpoint import Tree
from fedkit.codec.protocol import Quantizer
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError, ReplyError
from fedkit.message import CODING, SUBMODEL, Report
from fedkit.ordinary import split
from fedkit.skipping import SkipRule

from .base import UpdateStrategy
from .cluster_map import ClusterMap
from .composition import check_inside_clusters
from .parts import PRODUCTS, WHOLE, LoraMode, Parts
from .slot_parts import SlotParts, num_slots_of

_WHOLE: Final = "clustering compares all adapters, and needs them whole."


class Tac(UpdateStrategy[ClusterState]):
    """One adapter per task, found by clustering. Clients need `fedkit.clients.TacMod`.

    A client's slot is its place for the adapter of one task. The arrays of `evaluate_fn` and of the result hold an
    adapter per cluster, ``cluster-0/NAME`` and so on (`fedkit.aggregation.slots`). Start from one plain adapter,
    with which every cluster begins. The `checkpoint` folder also gets ``clusters.jsonl``: see `ClusterMap`.

    Parameters
    ----------
    num_clusters : int
        The number of tasks over all clients; with ``number="at-most"``, an upper bound.
    number : {"given", "at-most"}
        Whether there are `num_clusters` clusters, or as many, up to that, as fit best.
    signature : {"factors", "product"}
        What is compared of two adapters: the LoRA factors, or their products.
    evidence : {"auto", "adapters", "updates", "features"}
        What is clustered (`fedkit.aggregation.evidence`). "adapters": those of the round, as published. "updates":
        the slots' updates of all rounds, of which the server keeps 8 KiB a slot. "features": how the frozen model
        represents a slot's examples, however short training is; apps send them once if they train with
        `fedkit.clients.features.Features`. "auto": features, if apps send them and they form clusters.
    max_slots : int, optional
        How many adapters one client may send; `num_clusters` if unset.
    quantizer : Quantizer
        Of the updates of the adapters; None: float32.
    density : float
        Share of each matrix of an adapter that clients send, above 0 to 1. All adapters have the same mask, drawn
        anew in each round, since adapters under masks of their own, as in SAFARI, are hard to compare.
    skip : SkipRule, optional
        Makes clients send innovations, and nothing if these are small: AQUILA's lazy sum, in each cluster. A
        client skips all its slots together; each of them then counts with what the server has from it.
    missing : {"drop", "reweight", "mifa", "safari"} or Missing
        How the slots of missing clients count in their clusters; with "safari", by what the most similar slot of
        the cluster sent. With `skip` they count with what the server has from them, and nothing else is possible.
    lora : {"factors", "product", "product-update"}
        How LoRA factors are averaged inside a cluster.
    distinct : bool
        Whether adapters of one client are for different tasks, and so never share a cluster.
    anchored, screened : bool
        Whether each cluster's present adapter is clustered, too, and whether outlying adapters are set aside.
    weighted : bool
        Whether clients are weighted by their number of examples; the adapters of one client weigh the same.
    tasks : mapping of str to sequence of int, optional
        The true task of each slot, by client id; used only for purity and ARI in the map.
    submodels : mapping of str to Cut, optional
        The part of every adapter that nodes hold, as in `UpdateStrategy`: a lower rank, `lora_rank`.
    seed : int
        Of k-means, of masks, and of the client sampling.
    **options
        As in `UpdateStrategy`.

    Raises
    ------
    ConfigError
        For impossible values and combinations.
    """

    scheme: ClassVar[str] = "tac"
    one_for_all: ClassVar[bool] = False
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(("row_mask", "ffa", "fedsa"), _WHOLE)
    parts_type: ClassVar[type[Parts]] = SlotParts
    parts: SlotParts
    aggregator: Clustered

    def __init__(
        self,
        *,
        num_clusters: int,
        number: Number = "given",
        signature: Signature = "factors",
        evidence: Evidence = "auto",
        max_slots: int | None = None,
        quantizer: Quantizer | None = None,
        density: float = 1.0,
        skip: SkipRule | None = None,
        missing: Choice | Missing = "drop",
        lora: LoraMode = "factors",
        distinct: bool = True,
        anchored: bool = True,
        screened: bool = True,
        weighted: bool = False,
        tasks: Assignment | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        check_inside_clusters(density, skip, Missing.of(missing), lora)
        inner: Aggregator[Any] = Mean(weighted)
        if lora in PRODUCTS:
            inner = ProductMean(weighted, lora == "product-update")
        elif skip is not None:
            inner = LazyMean(weighted)
        elif density < 1:
            inner = MaskedMean(weighted)
        rules = Tasks(num_clusters, number, signature, distinct, anchored, screened, seed, evidence)
        options.setdefault("downlink", None)
        aggregator = Clustered(rules, inner)
        super().__init__(
            aggregator, Codec(quantizer), missing="drop" if skip else missing, lora=lora, seed=seed, **options
        )
        if density < 1 and self.parts.differ:
            raise ConfigError("density: not with submodels: the one mask of a round is of whole adapters.")
        self.num_clusters, self.density, self.skip, self.evidence = num_clusters, density, skip, evidence
        self.max_slots = num_clusters if max_slots is None else max_slots
        if self.max_slots < 1:
            raise ConfigError(f"max_slots must be at least 1, got {max_slots}.")
        self.state = ClusterState()
        self._map = ClusterMap(tasks)
        self._lacking: set[str] = set()  # clients with slots whose features the server lacks
        self._steps: Sequence[float] = ()  # squared norm of the last step of each cluster

    @classmethod
    def published(cls, **options: Any) -> Self:
        """Return FL-TAC as published: k-means alone decides which adapters are for the same task."""
        return cls(**{"evidence": "adapters", "distinct": False, "anchored": False, "screened": False, **options})

    # ---- what the strategy remembers -----------------------------------------------------------

    def remember(self) -> Tree:
        """Return what the aggregator remembers, and what the skip rule needs."""
        return {"aggregation": super().remember(), "steps": list(self._steps)}

    def recall(self, params: NamedArrays, saved: Tree | None) -> None:
        """Restore what `remember` returned; with `skip`, a client whose file is lost starts anew."""
        super().recall(params, saved and saved["aggregation"])
        self._steps = saved["steps"] if saved else ()
        self._accept()

    def _accept(self) -> None:
        if self.skip is not None:
            self.registry.accepted = self.aggregator.digests(self.state)

    # ---- Flower's round ------------------------------------------------------------------------

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord, num_rounds: int = 3, *args: Any, **kwargs: Any
    ) -> Result:
        """Run all rounds from one adapter, or from one per cluster; see Flower's `Strategy.start`."""
        adapter, ordinary = split(initial_arrays, ())
        params = ordinary.record(replicate(adapter, self.num_clusters))
        return super().start(grid, params, num_rounds, *args, **kwargs)

    def distribute(self, params: NamedArrays, node_ids: Sequence[int]) -> Mapping[int, NamedArrays]:
        """Return, for each slot of each node, the adapter of its cluster; v^0 for an unknown node."""
        clusters, newcomer = split_clusters(params), [self.state.start]
        slots = {node_id: [clusters[k] for k in self._clusters_of(node_id)] or newcomer for node_id in node_ids}
        return self.parts.distribute_slots(slots, self.registry.submodels)

    def _clusters_of(self, node_id: int) -> Sequence[int]:
        """Return the clusters of a node's slots; none if it is not known."""
        return self.state.assignment.get(self.registry.names([node_id]).get(node_id, ""), ())

    def _told(self, client: str, num_slots: int) -> bool:
        """Return whether the server has the features of all of a client's slots."""
        known = self.state.evidence
        return num_slots > 0 and all(slot_name(client, slot) in known for slot in range(num_slots))

    def check(self, node_id: int, report: Report) -> None:
        """Raise ReplyError for a bad number of slots, bad features, or required features that are missing."""
        num_slots, features = num_slots_of(report, self.max_slots), report.options.get(FEATURES)
        if features is not None:
            features_from_text(features, num_slots)
            self._lacking.discard(report.client_id)
        elif not (report.skipped or self._told(report.client_id, num_slots)):
            self._lacking.add(report.client_id)  # it is asked for them next time
            if self.evidence == "features":
                raise ReplyError("features: the server lacks those of a slot, and they did not come.")

    def _options_of(self, node_id: int, known: dict[str, Mapping[str, Scalar]]) -> Mapping[str, Scalar]:
        """Return how a node codes its slots, and when it may skip, given the last steps of its own clusters."""
        part = self.parts.sent.get(node_id, WHOLE)
        options: dict[str, Scalar] = {} if part == WHOLE else {SUBMODEL: part}
        if self.skip is not None:
            step = sum(self._steps[k] for k in self._clusters_of(node_id)) if self._steps else 0.0
            options |= {CODING: "aquila", **self.skip.to_options([step])}
        elif self.density < 1:
            options |= {CODING: "masked", "density": self.density, "seed": self.seed}
        client = self.registry.names([node_id]).get(node_id, "")
        lacks = client in self._lacking or not self._told(client, len(self._clusters_of(node_id)))
        if self.evidence in ASKED and lacks:
            options |= {FEATURES: ASKED[self.evidence]}
        return options

    def expected(self, sent: NamedArrays, report: Report) -> NamedArrays:
        """Return arrays with the names and shapes of all slots that the client reports."""
        num_slots = num_slots_of(report, self.max_slots)
        return join_slots(split_slots(sent, num_slots))

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Return the new arrays and metrics, and add the round's adapters to the map."""
        before = self._params
        arrays, metrics = super().aggregate_train(server_round, replies)
        self._accept()
        if arrays is not None:
            moved = zip(split_clusters(self.border.inward(arrays)), split_clusters(before), strict=True)
            self._steps = [squared_norm(subtract(new, old)) for new, old in moved]
            self._map.put(self.progress.folder, server_round + self.progress.before, self.state.seen)
        return arrays, metrics
