"""The constructor options that every strategy shares with Flower's FedAvg, typed once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias, TypedDict

from flwr.app import MetricRecord, RecordDict

MetricsFn: TypeAlias = Callable[[list[RecordDict], str], MetricRecord]


class FedAvgOptions(TypedDict, total=False):
    """See Flower's FedAvg."""

    fraction_train: float
    fraction_evaluate: float
    min_train_nodes: int
    min_evaluate_nodes: int
    min_available_nodes: int
    weighted_by_key: str
    arrayrecord_key: str
    configrecord_key: str
    train_metrics_aggr_fn: MetricsFn
    evaluate_metrics_aggr_fn: MetricsFn
