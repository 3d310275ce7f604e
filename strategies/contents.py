"""What an app's reply holds besides its arrays: metrics, one of which is the weight of the reply."""

from __future__ import annotations

import logging
from collections import Counter
from typing import Final

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays
from fedkit.codec.wire import open_frame
from fedkit.errors import LACKING, ReplyError
from fedkit.message import STYPE, records_of

logger = logging.getLogger(__name__)

MAX_WEIGHT: Final = 1e15  # of a reply; an update of norm 1e18 times this fits a float32


def content_of(reply: Message) -> RecordDict:
    """Return the content of a reply; raises ReplyError if the reply is an error."""
    if reply.has_error():
        reason = " ".join(str(reply.error.reason).split())  # one line of the log
        raise ReplyError(f"it answered with an error: {LACKING if STYPE in reason else reason}")
    return reply.content


def metrics_of(content: RecordDict) -> dict[str, float]:
    """Return the scalar metrics of a reply."""
    return {key: float(value) for key, value in _items(content) if isinstance(value, int | float)}


def weight_of(reply: Message, key: str) -> float:
    """Return the weight of a reply; raises ReplyError unless it is above 0 and at most `MAX_WEIGHT`."""
    weight = metrics_of(content_of(reply)).get(key)
    if weight is None:
        raise ReplyError(f"it lacks the metric {key!r}, which it weighs by. Does the app report it?")
    if not 0 < weight <= MAX_WEIGHT:
        raise ReplyError(f"its metric {key!r} must be above 0, at most {MAX_WEIGHT:.0e}, got {weight}.")
    return weight


def mean_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Return the mean of each metric over the replies that have it, weighted by `weighted_by_key`.

    NaN and infinite values are left out, and the log says of how many replies.
    """
    unusable: Counter[str] = Counter()
    sums: dict[str, NDArray[np.float64]] = {}
    weights: dict[str, float] = {}
    for content in contents:
        weight = metrics_of(content)[weighted_by_key]
        for key, value in _items(content):
            part = weight * np.asarray(value, np.float64)
            if not np.isfinite(part).all():
                unusable[key] += 1
            elif key != weighted_by_key and sums.get(key, part).shape == part.shape:
                sums[key] = sums.get(key, 0.0) + part
                weights[key] = weights.get(key, 0.0) + weight
    for key, times in unusable.items():
        logger.warning("metric %r is NaN or infinite in %d of %d replies: left out.", key, times, len(contents))
    return MetricRecord({key: (value / weights[key]).tolist() for key, value in sums.items()})


def _items(content: RecordDict) -> list[tuple[str, int | float | list[int] | list[float]]]:
    return [item for record in records_of(content, MetricRecord) for item in record.items()]


def opened(data: bytes, like: NamedArrays) -> tuple[NamedArrays, Mask | None]:
    """Return the arrays and the mask of a frame that was checked before."""
    frame = open_frame(data, like=like)
    return frame.arrays(), frame.mask
