"""The interface of an aggregation: what it is given and what it returns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, Generic, NamedTuple, Protocol, TypeAlias, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays
from fedkit.errors import ConfigError

S = TypeVar("S")

StepSize: TypeAlias = float | Callable[[int], float]
"""α, or a function of the round that returns it."""


def step_at(step_size: StepSize, server_round: int) -> np.float32:
    """Return the step size of a round; raises ConfigError unless it is above 0."""
    size = np.float32(step_size(server_round) if callable(step_size) else step_size)
    if not 0 < size < np.inf:
        raise ConfigError(f"step_size: expected a number above 0, got {size} in round {server_round}.")
    return size


@dataclass(frozen=True, slots=True)
class Cohort:
    """Who was asked this round, and what each was sent."""

    server_round: int
    sent: Mapping[int, NamedArrays]  # node id -> arrays
    client_ids: Mapping[int, str] = field(default_factory=dict)  # of the nodes that have ever answered
    submodels: Mapping[int, str] = field(
        default_factory=dict
    )  # what part of the arrays each node was sent, by name
    owned: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)  # entries of each part, flat; none: all
    everybody: bool = False  # whether all available clients were asked: all others are missing
    members: Mapping[str, int] | None = None  # the node of each client that counts; None: all count


@dataclass(frozen=True, slots=True)
class Upload:
    """One usable reply."""

    node_id: int
    client_id: str  # stable over restarts, unlike Flower's node id; uploads are ordered by it
    num_examples: float  # the weight; above 0
    arrays: NamedArrays | None  # what the frame holds; None: the client skipped
    mask: Mask | None  # which entries were sent; None: all
    fresh: bool  # the arrays replace what the server had from this client, rather than add to it
    metrics: Mapping[str, float]
    wire_bytes: int  # of the frame
    digest: bytes  # of the client's memory after this upload, 16 bytes; see `fedkit.memory`
    submodel: str = ""  # the part that the client holds: a key of `Cohort.owned`; its other entries are zero
    again: Callable[[], tuple[NamedArrays, Mask | None]] | None = None  # decodes arrays and mask once more
    features: object = None  # of its slots, if asked for: `fedkit.aggregation.evidence`


NOBODY: Final[Mapping[str, str]] = MappingProxyType({})


class Aggregate(NamedTuple, Generic[S]):
    """The result of a round."""

    params: NamedArrays
    state: S
    metrics: Mapping[str, float]
    stand_ins: Mapping[str, str] = NOBODY  # for each missing client; itself: by what it sent last


class Aggregator(Protocol[S]):
    """Turns uploads into new parameters. It is stateless: its state is passed in and returned."""

    def init(self, params: NamedArrays) -> S:
        """Return the state before the first round."""

    def __call__(self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: S) -> Aggregate[S]:
        """Return the new parameters; `uploads` are decoded one at a time, so iterate only once."""


@runtime_checkable
class Remembering(Protocol[S]):
    """An aggregator whose state is not a plain value, since the clients' arrays are in files."""

    def remember(self, state: S) -> dict[str, Any]:
        """Return the plain values that `recall` needs."""

    def recall(self, params: NamedArrays, saved: Mapping[str, Any], folder: Path | None) -> S:
        """Return the state of a run that keeps files in `folder`; of a new one if `saved` is empty."""
