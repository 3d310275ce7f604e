"""AQUILA's lazy aggregation: the mean of what the server has from every client, new or old.

The paper (see `fedkit.codec.quantize`) keeps ``q_m``, client m's last transmitted gradient, and steps along
``qbar = (1/M) Σ q_m``; an upload is the quantized innovation Δq_m with ``q_m ← q_m + Δq_m``, and a client that
skips, or whose reply is lost, still counts with its old q_m.

==========  =============================  ============================
paper       meaning                        here
==========  =============================  ============================
q_m         what the server has from m     `LazyState.memory`
Δq_m        quantized innovation           `Upload.arrays`
θ           model                          `params`
β           how much silence is allowed    `skip_threshold`'s `beta`
==========  =============================  ============================

Deviations from the paper
-------------------------
An upload is an update (local − received), which is −α times the paper's gradient, so α is absorbed and
``θ ← θ + mean``. The mean is weighted by the number of examples unless `weighted` is False. It is summed anew
each round from the memories instead of kept as a running sum, which costs O(clients) and never drifts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fedkit.aggregation.mean import weighted_mean
from fedkit.aggregation.protocol import Aggregate, Cohort, Upload
from fedkit.arrays import NamedArrays, add, squared_norm, subtract


@dataclass(frozen=True, slots=True)
class LazyState:
    """What the server has from each client, by client id."""

    memory: Mapping[str, NamedArrays] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LazyMean:
    """Adds innovations to the memories and steps along their mean, over all clients ever heard from."""

    weighted: bool = True  # by number of examples; False: every client counts the same

    def init(self, params: NamedArrays) -> LazyState:
        """Return the state of a server that has heard from nobody."""
        return LazyState()

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: LazyState
    ) -> Aggregate[LazyState]:
        """Return params + mean of the memories."""
        memory, weights = dict(state.memory), dict(state.weights)
        for upload in uploads:
            if upload.arrays is not None:
                replace = upload.fresh or upload.client_id not in memory
                memory[upload.client_id] = (
                    dict(upload.arrays) if replace else add(memory[upload.client_id], upload.arrays)
                )
            weights[upload.client_id] = upload.num_examples if self.weighted else 1.0
        step = weighted_mean(((weights[name], memory[name]) for name in sorted(memory)), like=params)
        return Aggregate(add(params, step), LazyState(memory, weights), {})


def skip_threshold(beta: float, params: NamedArrays, previous: NamedArrays | None) -> float:
    """Return β‖θ^k − θ^{k−1}‖², at or below which an upload is not worth sending; 0 before there is a θ^{k−1}."""
    return 0.0 if previous is None else beta * squared_norm(subtract(params, previous))
