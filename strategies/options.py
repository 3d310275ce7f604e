"""The constructor options that every strategy shares with Flower's FedAvg, with their types."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import TypeAlias, TypedDict

from flwr.app import MetricRecord, RecordDict

from fedkit.config import check_keys
from fedkit.errors import ConfigError

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


def check_names(of: type, names: Iterable[str]) -> None:
    """Check that a strategy has options of these names; raises TypeError with the nearest known name."""
    constructors = [vars(base)["__init__"] for base in of.__mro__ if "__init__" in vars(base)]
    signatures = [inspect.signature(each).parameters.values() for each in constructors]
    known = {p.name for parameters in signatures for p in parameters if p.kind is not p.VAR_KEYWORD}
    try:
        check_keys(names, known - {"self", "args"}, what=f"option of {of.__name__}")
    except ConfigError as error:
        raise TypeError(str(error)) from None
