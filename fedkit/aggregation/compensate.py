"""Stand-ins for clients that did not answer, for use with any mean; among them SAFARI's surrogates.

Y. Mao, Z. Zhao, M. Yang, et al., "SAFARI: Sparsity-Enabled Federated Learning with Limited and Unreliable
Communications", IEEE TMC 23(5), 2024, https://arxiv.org/abs/2204.02321.

=============  ==========================================  =====================================
paper          meaning                                     here
=============  ==========================================  =====================================
R_t            clients whose update arrived                the `uploads`
w_i            sparse local model of client i              params + update, under its mask
m_i            mask of client i                            `Upload.mask`
s_ij           similarity of clients i and j               `Similarity`
j*(i)          argmax of s_ij over j in R_t                `Similarity.nearest`
=============  ==========================================  =====================================

`Compensated` passes the uploads on to a mean and adds a stand-in for each missing client, with that client's
weight and the update that `fedkit.aggregation.missing` chooses for it. So it works with any mean: of masked or
whole updates, of parts of the model, or of the products of LoRA factors. Entries that a stand-in does not hold are
treated as the mean treats entries that a client does not hold.

Deviations from the paper
-------------------------
The paper was known only through its abstract and a third-party replication. `fedkit.strategies.Safari.published`
follows those: the similarity is −‖w_i − w_j‖, of which the last value is kept; ``θ ← (1/N) Σ w_i`` shrinks entries
that few clients keep; there is no warm-up. The default differs where that was measured to be worse: similarity is
the running mean of the cosine of updates over the entries that both clients sent, with recent rounds counting
more; a surrogate is weighted by its similarity, so that it fades where updates are mostly noise; an entry is
averaged over the clients that keep it; clients are weighted by their number of examples; and the first rounds only
observe. In both, similarity is between uploads of the same round, so that the server need not keep a model of each
client. A missing client has no surrogate if it was never heard from, or if its similarity to all clients that
answered is unknown. If nobody answered, the parameters stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fedkit.aggregation.cluster import Clustered
from fedkit.aggregation.mean import MaskedMean, Mean
from fedkit.aggregation.memories import Memories
from fedkit.aggregation.missing import Known, Missing
from fedkit.aggregation.product import ProductMean
from fedkit.aggregation.protocol import Aggregate, Aggregator, Cohort, Upload
from fedkit.aggregation.similarity import Similarity
from fedkit.aggregation.stand_ins import CompensateState, Turn
from fedkit.arrays import NamedArrays
from fedkit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Compensated:
    """A mean over the clients that answered and the stand-ins of those that did not.

    "safari" has all uploads of a round in memory, the other choices one at a time.
    """

    inner: Aggregator[Any]  # weighs by `Upload.num_examples`
    missing: Missing
    weighted: bool = True  # by number of examples; False: every client counts the same

    def init(self, params: NamedArrays) -> CompensateState:
        """Return the state of a server that knows no client yet, its memory in RAM; see `recall`."""
        return self.recall(params, {}, None)

    def remember(self, state: CompensateState) -> dict[str, Any]:
        """Return the plain values that `recall` needs: all but the arrays of clients, which are in files."""
        similarity = state.similarity
        return {
            "clients": {name: known.plain() for name, known in state.clients.items()},
            "similarity": [similarity.clients, similarity.sums, similarity.counts],
            "rounds": state.rounds,
            "latest": state.latest,
            "digests": dict(state.memory.digests) if state.memory else {},
            "inner": state.inner,
        }

    def recall(self, params: NamedArrays, saved: Mapping[str, Any], folder: Path | None) -> CompensateState:
        """Return the state of a run that keeps files in `folder`; of a new one if `saved` is empty."""
        memory = Memories(params, folder) if self.missing.remembers else None
        if not saved:
            return CompensateState(memory=memory, inner=self.inner.init(params))
        clients = {name: Known.from_plain(values) for name, values in saved["clients"].items()}
        if memory is not None:
            for name, digest in saved["digests"].items():
                memory.open(name, digest)
        similarity = Similarity(*saved["similarity"])
        rounds = saved["rounds"], saved.get("latest", 0)
        return CompensateState(clients, similarity, *rounds, memory, saved["inner"])

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: CompensateState
    ) -> Aggregate[CompensateState]:
        """Return params moved by the mean of the updates that arrived and of the stand-ins; see `Aggregate`."""
        turn = Turn(self.missing, self.weighted, params, cohort, state)
        new, inner, metrics, _ = self.inner(params, cohort, turn.completed(uploads), state.inner)
        if turn.share != 1:
            new = {name: params[name] + np.float32(turn.share) * (new[name] - params[name]) for name in params}
        metrics = {**metrics, "surrogates": len(turn.stand_ins)}
        return Aggregate(new, turn.state(inner), metrics, turn.stand_ins)


def compensated(inner: Aggregator[Any], missing: Missing) -> Aggregator[Any]:
    """Return `inner` with stand-ins for missing clients as `missing` says; with "drop", `inner` itself.

    Raises
    ------
    ConfigError
        If the two do not go together, with the reason.
    """
    if missing.by == "drop":
        return inner
    if isinstance(inner, Clustered):
        return replace(inner, inner=compensated(inner.inner, missing))
    # a client's last update belongs to a sparse model that is gone: measured worse than the most similar client's
    lasting = not isinstance(inner, ProductMean) and not (isinstance(inner, MaskedMean) and inner.sparse_model)
    missing = missing.settled(lasting=lasting)
    if not isinstance(inner, Mean | MaskedMean | ProductMean):
        raise ConfigError(f"missing: {missing.by!r} needs a mean over the uploads, got {type(inner).__name__}.")
    reasons = {
        "a factor of an update is no factor of the change of the products": missing.by == "reweight",
        "what a client sent is in the terms of factors that the next SVD replaces": missing.remembers,
    }
    for reason in (reason for reason, holds in reasons.items() if holds and isinstance(inner, ProductMean)):
        raise ConfigError(f"missing: {missing.by!r} not with the mean of LoRA products: {reason}.")
    if isinstance(inner, Mean) and inner.step_size != 1.0 and missing.surrogate == "update":
        raise ConfigError("missing: surrogate 'update' moves on models, so not with a step_size. Use 'model'.")
    if missing.by == "reweight" and isinstance(inner, Mean) and inner.gap:
        raise ConfigError("gap: not with missing='reweight', whose weights do not sum to one.")
    return Compensated(replace(inner, weighted=True), missing, inner.weighted)
