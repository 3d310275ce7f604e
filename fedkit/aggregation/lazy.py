"""AQUILA's lazy aggregation: the mean of what the server has from every client, new or old.

The paper (see `fedkit.codec.quantize`) keeps ``q_m``, client m's last transmitted gradient, and steps along
``qbar = (1/M) Σ q_m``; an upload is the quantized innovation Δq_m with ``q_m ← q_m + Δq_m``, and a client that
skips, or whose reply is lost, still counts with its old q_m.

==========  =============================  ==================================================
paper       meaning                        here
==========  =============================  ==================================================
q_m         what the server has from m     `LazyState.memory`
Σ q_m       their sum                      `LazySum.total`, or summed anew from `LazyState`
Δq_m        quantized innovation           `Upload.arrays`
θ           model                          `params`
α           step size                      `step_size`
==========  =============================  ==================================================

Deviations from the paper
-------------------------
An upload is an update (local − received) divided by the step size. It is minus the paper's gradient if the client
took one step of SGD, and the update itself at the default step size of 1: ``θ ← θ + α mean``. The mean is weighted
by the number of examples unless `weighted` is False. By default the sum is recomputed each round over what every
client sent, which costs O(clients), never drifts, and lets a client leave, change its weight or start anew; the
paper's running sum is ``memory="sum"``.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.lora import LORA_GAP, Products
from fedkit.aggregation.mean import NO_PARTS, Owned, Total, divided, plus
from fedkit.aggregation.memories import Memories
from fedkit.aggregation.protocol import Aggregate, Cohort, StepSize, Upload, step_at
from fedkit.arrays import NamedArrays, add, check_same_schema, flatten, num_values, unflatten
from fedkit.errors import ConfigError

logger = logging.getLogger(__name__)

Memory: TypeAlias = Literal["each", "sum"]


@dataclass(frozen=True, slots=True)
class LazyState:
    """What the server has from each client; changed in place."""

    memory: Memories
    weights: dict[str, float] = field(default_factory=dict)  # from the last reply of each client in `memory`
    submodels: dict[str, str] = field(default_factory=dict)  # the part that a client holds, if not all

    @classmethod
    def open(
        cls,
        like: NamedArrays,
        folder: Path | None,
        digests: Mapping[str, bytes] | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> Self:
        """Return a state kept in files, with the values of an earlier run that are found and have a weight."""
        memory, weights = Memories(like, folder), weights or {}
        known = {name: digest for name, digest in (digests or {}).items() if name in weights}
        found = {name: weights[name] for name, digest in known.items() if memory.open(name, digest)}
        return cls(memory, found)

    @property
    def digests(self) -> Mapping[str, bytes]:
        """Return the history digest of each client that may add to its memory; all others must start anew."""
        return self.memory.digests

    def take(self, upload: Upload, weight: float) -> None:
        """Add an upload to what its client sent before, or replace that."""
        name, arrays = upload.client_id, upload.arrays
        if not upload.fresh and upload.submodel != self.submodels.get(name, ""):
            logger.warning("Client %r holds another part of the model than before: it starts anew.", name)
            self.discard(name)
            return
        if arrays is not None and upload.fresh:
            self.memory.put(name, arrays, upload.digest)
            self.submodels.pop(name, None)
            if upload.submodel:
                self.submodels[name] = upload.submodel
        elif arrays is not None and not self.memory.add(name, arrays, upload.digest):
            logger.warning("Client %r added to a memory that is not there: it starts anew.", name)
        if name in self.memory:
            self.weights[name] = weight
        else:
            self.weights.pop(name, None)

    def discard(self, client_id: str) -> None:
        """Forget a client that left."""
        self.memory.discard(client_id)
        self.weights.pop(client_id, None)
        self.submodels.pop(client_id, None)

    def clients(
        self, owned: Owned, members: Collection[str] | None = None
    ) -> Iterator[tuple[float, NDArray[np.float32], NDArray[np.bool_] | None]]:
        """Yield each client's weight, what it sent, and which entries it holds (None: all); one at a time."""
        for name in self.memory:
            if members is not None and name not in members:
                continue
            vector = self.memory.vector(name)
            if vector is None:  # its file was lost since
                self.weights.pop(name, None)
                continue
            yield self.weights[name], vector, owned.get(self.submodels.get(name, ""))

    def mean(self, owned: Owned = NO_PARTS, members: Collection[str] | None = None) -> NDArray[np.float32]:
        """Return the weighted mean, of each entry over the clients that hold it; zero where no client does."""
        total: Total = 0.0
        sums = np.zeros(self.memory.num_values, np.float64)
        scaled = np.empty_like(sums)
        for weight, vector, own in self.clients(owned, members):
            total = plus(total, weight, own)
            scaled[:] = vector
            scaled *= weight
            sums += scaled
        return divided(sums, total).astype(np.float32)

    def carried(self) -> LazyState:
        """Return the state for the next round."""
        return self


@dataclass(slots=True)
class LazySum:
    """The weighted sum of what all clients sent; per client, only weight and digest. Changed in place."""

    total: NDArray[np.float64]
    weights: dict[str, float] = field(default_factory=dict)  # of each client's first upload
    digests: dict[str, bytes] = field(default_factory=dict)  # as in `LazyState`
    broken: bool = False  # whether a client that is in the sum started anew

    def take(self, upload: Upload, weight: float) -> None:
        """Add an upload to the sum."""
        name, arrays = upload.client_id, upload.arrays
        if arrays is None:
            return
        if upload.fresh and name in self.weights:  # its share of the sum is no longer known
            self.broken = True
            return
        if not upload.fresh and name not in self.weights:
            logger.warning("Client %r added to a memory that is not there: it starts anew.", name)
            return
        self.weights.setdefault(name, weight)
        self.digests[name] = upload.digest
        self.total += self.weights[name] * flatten(arrays).astype(np.float64)

    def mean(self) -> NDArray[np.float32]:
        """Return the weighted mean; a client that started anew still counts with what it sent before."""
        return (self.total / (sum(self.weights.values()) or 1.0)).astype(np.float32)

    def carried(self) -> LazySum:
        """Return the state for the next round: an empty one if the sum holds what its client has lost."""
        if not self.broken:
            return self
        logger.warning("A client lost its memory, so the sum is void: all %d start anew.", len(self.weights))
        return LazySum(np.zeros_like(self.total))


@dataclass(frozen=True, slots=True)
class LazyMean:
    """Adds innovations to what each client sent and steps along the mean over all clients ever heard from.

    Parameters
    ----------
    weighted : bool
        Whether to weight by number of examples; False: every client counts the same.
    memory : {"each", "sum"}
        Whether the server remembers what each client sent, or only the sum; see `fedkit.strategies.Aquila`.
    step_size : float or callable
        What the mean is multiplied by, by round if callable.
    gap : bool
        Whether to measure the gap of LoRA factors (`fedkit.aggregation.lora`) over what clients hold; with "each".

    Raises
    ------
    ConfigError
        If there is no such `memory`.
    """

    weighted: bool = True
    memory: Memory = "each"
    step_size: StepSize = field(default=1.0, repr=False)  # a function's repr differs from run to run
    gap: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        if self.memory not in ("each", "sum"):
            raise ConfigError(f"memory: expected 'each' or 'sum', got {self.memory!r}. Name one of them.")

    def init(self, params: NamedArrays) -> LazyState | LazySum:
        """Return the state of a server that knows no client yet; with "each", in RAM: see `LazyState.open`."""
        if self.memory == "sum":
            return LazySum(np.zeros(num_values(params), np.float64))
        return LazyState(Memories(params))

    def remember(self, state: LazyState | LazySum) -> dict[str, Any]:
        """Return the plain values that `recall` needs: with "each", all but the arrays, which are in files."""
        saved: dict[str, Any] = {"weights": dict(state.weights), "digests": dict(state.digests)}
        if isinstance(state, LazySum):
            return saved | {"total": state.total}
        return saved | {"submodels": dict(state.submodels)}

    def recall(self, params: NamedArrays, saved: Mapping[str, Any], folder: Path | None) -> LazyState | LazySum:
        """Return the state of a run that keeps files in `folder`; of a new one if `saved` is empty.

        Clients whose files do not hold what was saved are left out, with a warning: the state's `digests` have the
        clients that were found, and all others must start anew.
        """
        weights, digests = saved.get("weights", {}), saved.get("digests", {})
        if self.memory == "sum":
            total = np.array(saved["total"]) if saved else np.zeros(num_values(params), np.float64)
            return LazySum(total, dict(weights), dict(digests))
        state = LazyState.open(params, folder, digests, weights)
        state.submodels.update({n: part for n, part in saved.get("submodels", {}).items() if n in state.memory})
        return state

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: LazyState | LazySum
    ) -> Aggregate[LazyState | LazySum]:
        """Return params + α · mean of what all clients sent. The state is changed in place."""
        missing = set(cohort.client_ids.values())
        for upload in uploads:
            if upload.arrays is not None:
                check_same_schema(upload.arrays, like=params)
            state.take(upload, upload.num_examples if self.weighted else 1.0)
            missing.discard(upload.client_id)
        size = step_at(self.step_size, cohort.server_round)
        step = size * (state.mean() if isinstance(state, LazySum) else state.mean(cohort.owned, cohort.members))
        new, metrics = add(params, unflatten(step, like=params)), {}
        if self.gap and isinstance(state, LazyState):
            products, now = Products(params), flatten(params)
            for weight, vector, own in state.clients(cohort.owned, cohort.members):
                held = now if own is None else now * own
                products.add(weight, unflatten(held + size * vector, like=params))
            metrics[LORA_GAP] = products.gap(new)
        stand_ins = {name: name for name in sorted(missing) if name in state.weights}
        return Aggregate(new, state.carried(), metrics, stand_ins)
