"""MARINA's aggregation: an estimate of the mean update, moved by the mean of the clients' differences.

E. Gorbunov, K. Burlachenko, Z. Li and P. Richtárik, "MARINA: Faster Non-Convex Distributed Learning with
Compression", ICML 2021, https://arxiv.org/abs/2102.07845, algorithm 1.

==========  ===================================================  ==========================================
paper       meaning                                              here
==========  ===================================================  ==========================================
g^k         the estimate                                         `Estimate.mean`
c_k         whether all send whole gradients (probability p)      uploads are `fresh`; the strategy decides
Q(…)        coded difference of two successive gradients         any other `Upload.arrays`
γ           step size                                            `step_size`
==========  ===================================================  ==========================================

Deviations from the paper
-------------------------
The gradient is minus the update of local training, divided by the step size. A client whose last upload was lost
has nothing in the estimate to add to: it skips rounds until all clients send whole updates again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.mean import mean_of
from fedkit.aggregation.protocol import Aggregate, Cohort, StepSize, Upload, step_at
from fedkit.arrays import NamedArrays, add, num_values, unflatten


@dataclass(slots=True)
class Estimate:
    """The server's estimate of the mean update."""

    mean: NDArray[np.float32]
    digests: dict[str, bytes] = field(default_factory=dict)  # of clients whose last-round upload is in it


@dataclass(frozen=True, slots=True)
class Differences:
    """Adds the mean difference to the estimate, or replaces it by the mean update; steps along it."""

    weighted: bool = True  # by number of examples; False: every client counts the same
    step_size: StepSize = field(
        default=1.0, repr=False
    )  # what the estimate is multiplied by, by round if callable

    def init(self, params: NamedArrays) -> Estimate:
        """Return the initial estimate: zeros."""
        return Estimate(np.zeros(num_values(params), np.float32))

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: Estimate
    ) -> Aggregate[Estimate]:
        """Return params + α · the new estimate."""
        digests: dict[str, bytes] = {}
        whole = False

        def sent() -> Iterator[Upload]:
            nonlocal whole
            for upload in uploads:
                if upload.arrays is not None:
                    digests[upload.client_id] = upload.digest
                    whole = upload.fresh
                    yield upload

        mean = mean_of(sent(), self.weighted, like=params, owned=cohort.owned)
        new = Estimate(mean if whole else state.mean + mean, digests)
        size = step_at(self.step_size, cohort.server_round)
        return Aggregate(add(params, unflatten(size * new.mean, like=params)), new, {})
