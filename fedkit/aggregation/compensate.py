"""SAFARI's server half: a surrogate for every client that was asked and did not answer.

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

A missing client's surrogate is what its most similar client sent, so it comes down to a weight: client j* counts
once more, with the weight of i.

Deviations from the paper
-------------------------
The paper was known through its abstract and a third-party replication. `Compensated.published` follows those:
similarity −‖w_i − w_j‖, last value kept; ``θ ← (1/N) Σ w_i``, which shrinks entries that few clients keep; no
warm-up. The default differs where that was measured to be worse: similarity is the running mean of the cosine of
updates over the entries that both sent, an entry is averaged over those that keep it, clients count by their
examples, and the first rounds only observe. In both, a missing client of unknown similarity to all that
arrived has no surrogate, and if nobody answered, the parameters stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.mean import owners_mean, weighted_mean
from fedkit.aggregation.protocol import Aggregate, Cohort, Upload
from fedkit.arrays import Mask, NamedArrays, add, flatten

Metric: TypeAlias = Literal["cosine", "l2"]


@dataclass(frozen=True, slots=True)
class Similarity:
    """How alike each pair of clients has been: O(clients²) numbers."""

    clients: tuple[str, ...] = ()
    sums: NDArray[np.float64] = field(default_factory=lambda: np.zeros((0, 0)))
    counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 0), np.int64))

    def observe(self, names: Sequence[str], values: NDArray[np.float64], *, keep_last: bool) -> Similarity:
        """Return this with one more value, shape (n, n), for every pair of `names`; NaN: none.

        Several values of a pair are averaged, or the last one is kept.
        """
        clients = (*self.clients, *(name for name in names if name not in self.clients))
        more = len(clients) - len(self.clients)
        sums, counts = np.pad(self.sums, (0, more)), np.pad(self.counts, (0, more))
        at = np.ix_(*[[clients.index(name) for name in names]] * 2)
        known = ~np.isnan(values)
        sums[at] = np.where(known, np.nan_to_num(values) + (0 if keep_last else sums[at]), sums[at])
        counts[at] = np.where(known, 1 if keep_last else counts[at] + 1, counts[at])
        return Similarity(clients, sums, counts)

    def nearest(self, client: str, among: Sequence[str]) -> str | None:
        """Return the most similar of `among`, the first of equals; None if none is known."""
        if client not in self.clients:
            return None
        me = self.clients.index(client)
        values = {}
        for name in among:
            if name in self.clients and self.counts[me, other := self.clients.index(name)]:
                values[name] = self.sums[me, other] / self.counts[me, other]
        return max(values, key=values.__getitem__, default=None)


@dataclass(frozen=True, slots=True)
class CompensateState:
    """What the server knows of its clients."""

    similarity: Similarity = field(default_factory=Similarity)
    weights: Mapping[str, float] = field(default_factory=dict)  # last reported, by client id
    rounds: int = 0  # with at least one upload


@dataclass(frozen=True, slots=True)
class Compensated:
    """The mean of sparse updates, with a surrogate for each missing client."""

    similarity: Metric = "cosine"
    warmup_rounds: int = 2  # rounds that only observe
    compensate: bool = True  # False: missing clients are dropped
    sparse_model: bool = False  # clients' models are sparse, and the mean is over all; else updates and owners
    weighted: bool = True  # by number of examples

    def init(self, params: NamedArrays) -> CompensateState:
        """Return the state of a server that knows nobody."""
        return CompensateState()

    def __call__(
        self, params: NamedArrays, cohort: Cohort, uploads: Iterable[Upload], state: CompensateState
    ) -> Aggregate[CompensateState]:
        """Return params moved by the updates that arrived and by the surrogates of those that did not."""
        received = {u.client_id: u for u in uploads if u.arrays is not None}
        if not received:
            return Aggregate(params, state, {"surrogates": 0})
        own = {name: u.num_examples if self.weighted else 1.0 for name, u in received.items()}
        known = {**state.weights, **own}
        values = self._similarities(params, list(received.values()))
        similarity = state.similarity.observe(list(received), values, keep_last=self.similarity == "l2")
        weights, surrogates = dict(own), 0
        if self.compensate and state.rounds >= self.warmup_rounds:
            for missing in sorted(set(cohort.client_ids.values()) - set(received)):
                kin = similarity.nearest(missing, sorted(received))
                if kin is not None:
                    weights[kin] += known[missing]
                    surrogates += 1
        step = self._mean(params, [(weights[n], u.arrays or {}, u.mask) for n, u in received.items()])
        return Aggregate(step, CompensateState(similarity, known, state.rounds + 1), {"surrogates": surrogates})

    def _mean(
        self, params: NamedArrays, weighted: Sequence[tuple[float, NamedArrays, Mask | None]]
    ) -> dict[str, NDArray[np.float32]]:
        if not self.sparse_model:
            return add(params, owners_mean(weighted, like=params))
        models = ((weight, sparse(add(params, update), mask)) for weight, update, mask in weighted)
        return weighted_mean(models, like=params)

    def _similarities(self, params: NamedArrays, uploads: Sequence[Upload]) -> NDArray[np.float64]:
        """Return the similarity of each pair, shape (n, n); NaN for a pair that shares no entry."""
        updates = np.stack([flatten(u.arrays or {}) for u in uploads])
        if self.similarity == "l2":
            if self.sparse_model:
                updates = np.stack([flatten(sparse(add(params, u.arrays or {}), u.mask)) for u in uploads])
            gram = updates.astype(np.float64) @ updates.T.astype(np.float64)
            size = np.diag(gram)
            return -np.sqrt(np.maximum(size[:, None] + size - 2 * gram, 0))
        kept = np.stack([np.ones(updates.shape[1]) if u.mask is None else _flat(u.mask) for u in uploads])
        shared = np.square(updates.astype(np.float64)) @ kept.T  # [i, j]: of i, over the entries that j keeps
        norms = np.sqrt(shared * shared.T)
        gram = updates.astype(np.float64) @ updates.T.astype(np.float64)
        return np.divide(gram, norms, out=np.full_like(gram, np.nan), where=norms > 0)


def sparse(arrays: NamedArrays, mask: Mask | None) -> dict[str, NDArray[np.float32]]:
    """Return the arrays with the entries that the mask drops set to zero."""
    return {name: array if mask is None else array * mask[name] for name, array in arrays.items()}


def _flat(mask: Mask) -> NDArray[np.float64]:
    return np.concatenate([part.ravel() for part in mask.values()]).astype(np.float64)
