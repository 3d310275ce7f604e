"""Carries out one round's choice of `fedkit.aggregation.missing`: which client stands in for which."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.memories import Memories
from fedkit.aggregation.missing import Known, Missing
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.aggregation.similarity import Similarity, cosines, distances
from fedkit.arrays import NamedArrays, add, flatten, flatten_mask, subtract, unflatten


@dataclass(frozen=True, slots=True)
class CompensateState:
    """What the server knows of its clients."""

    clients: Mapping[str, Known] = field(default_factory=dict)  # all that were ever heard from
    similarity: Similarity = field(default_factory=Similarity)
    rounds: int = 0  # with at least one upload
    latest: int = 0  # the last of these
    memory: Memories | None = None  # represents missing clients; changed in place
    inner: Any = None  # of the mean


class Turn:
    """The uploads of one round on their way to the mean, and those added to them."""

    def __init__(
        self, missing: Missing, weighted: bool, params: NamedArrays, cohort: Cohort, state: CompensateState
    ) -> None:
        self.missing, self.weighted = missing, weighted
        self.params, self.cohort, self.before = params, cohort, state
        self.memory, self.similarity = state.memory, state.similarity
        self.received: dict[str, Known] = {}
        self.stand_ins: dict[str, str] = {}  # who stood in for each client
        self.share = 1.0  # what the step is multiplied by
        self.rounds = state.rounds - (state.latest == cohort.server_round)  # before this one

    def completed(self, uploads: Iterable[Upload]) -> Iterator[Upload]:
        """Yield the uploads and the stand-ins, with their weights."""
        arrived = (self._received(upload) for upload in uploads if upload.arrays is not None)
        if self.missing.by == "safari":
            found = list(arrived)
            yield from found
            if found:
                yield from self._surrogates(found)
        elif self.missing.by == "mifa":
            for upload in arrived:
                self._keep(upload.client_id, upload.arrays or {})
                yield upload
            yield from self._last_updates()
        else:
            yield from self._reweighted(arrived)

    def state(self, inner: Any) -> CompensateState:
        """Return what is known after the round."""
        if not self.received:
            return replace(self.before, inner=inner)
        clients = {**self.before.clients, **self.received}
        clients |= {name: clients[name].missed() for name in self._expected()}
        rounds = self.rounds + 1, self.cohort.server_round
        return CompensateState(clients, self.similarity, *rounds, self.memory, inner)

    # ---- the choices ---------------------------------------------------------------------------

    def _surrogates(self, arrived: list[Upload]) -> Iterator[Upload]:
        """Yield the most similar client's upload, or the missing client's own last; record similarities."""
        by_name = {upload.client_id: upload for upload in arrived}
        self._observe(arrived)
        for upload in arrived:
            update = upload.arrays or {}
            self._keep(upload.client_id, update if self.missing.own else add(self.params, update))
        observes = self.rounds < self.missing.warmup_rounds
        for name, known in self._absent():
            kin = None if observes else self.similarity.nearest(name, list(by_name))
            own = self._last_update(name, known) if self.missing.own else None
            itself = name, self.similarity.of(name)
            by, alike = itself if kin is None or (own is not None and kin[1] < itself[1]) else kin
            share = 1.0 if self.missing.similarity == "l2" else alike
            sent = own if by == name else by_name[by]
            if sent is not None and share > 0:
                self.stand_ins[name] = by
                weight = share * self._weight(known)
                yield replace(sent, client_id=name, num_examples=weight, arrays=self._moved(name, sent))

    def _observe(self, arrived: list[Upload]) -> None:
        """Record the similarities of clients to each other, and to themselves."""
        l2 = self.missing.similarity == "l2"
        rows, kept = [flatten(self._compared(u)) for u in arrived], [self._kept(u) for u in arrived]
        values = distances(rows) if l2 else cosines(rows, kept)
        np.fill_diagonal(values, np.nan)
        if self.missing.own and self.memory is not None:
            for i, upload in enumerate(arrived):
                before = self.memory.vector(upload.client_id)
                if before is not None:
                    masked = self.before.clients[upload.client_id].masked
                    sent = before != 0 if masked else None
                    values[i, i] = cosines([rows[i], before], [kept[i], sent])[0, 1]
        names = [upload.client_id for upload in arrived]
        self.similarity = self.similarity.observe(names, values, keep_last=l2)

    def _moved(self, name: str, kin: Upload) -> NamedArrays:
        """Return the update that brings a missing client to its surrogate."""
        update = kin.arrays or {}
        own = self.memory.get(name) if self.memory is not None and self.missing.surrogate == "update" else None
        if own is None:
            return update
        model = add(own, update)
        self._keep(name, model)
        return subtract(model, self.params)

    def _last_updates(self) -> Iterator[Upload]:
        """Yield what each missing client sent last."""
        for name, known in self._absent() if self.received else ():
            own = self._last_update(name, known)
            if own is not None:
                self.stand_ins[name] = name
                yield own

    def _last_update(self, name: str, known: Known) -> Upload | None:
        """Return what a missing client sent last, as an upload of this round; None if that is not there."""
        vector = None if self.memory is None else self.memory.vector(name)
        if vector is None:
            return None
        nodes = (node_id for node_id, client in self.cohort.client_ids.items() if client == name)
        node_id = next(nodes, next(iter(self.cohort.sent), 0))  # if it was not asked, any node: all got the same
        arrays = unflatten(vector, like=self.params)
        mask = {key: array != 0 for key, array in arrays.items()} if known.masked else None
        return Upload(node_id, name, self._weight(known), arrays, mask, False, {}, 0, b"", known.submodel)

    def _reweighted(self, arrived: Iterable[Upload]) -> Iterator[Upload]:
        """Yield the uploads, each weighted by how rarely its client answers."""
        total = 0.0
        for upload in arrived:
            rarity = self.before.clients.get(upload.client_id, Known()).interval
            total += rarity * upload.num_examples
            yield replace(upload, num_examples=rarity * upload.num_examples)
        everybody = [*self.received.values(), *(known for _, known in self._absent())]
        self.share = total / (sum(map(self._weight, everybody)) or 1.0)

    # ---- who is there --------------------------------------------------------------------------

    def _received(self, upload: Upload) -> Upload:
        """Return an upload with its weight, and record what is known of its client."""
        name, masked = upload.client_id, upload.mask is not None
        known = self.before.clients.get(name, Known())
        self.received[name] = known.answered(upload.num_examples, upload.submodel, masked=masked)
        return replace(upload, num_examples=self._weight(self.received[name]))

    def _expected(self) -> list[str]:
        """Return the missing clients, in order; without those that were never heard from."""
        wanted = self.before.clients if self.cohort.everybody else self.cohort.client_ids.values()
        members = self.before.clients if self.cohort.members is None else self.cohort.members
        known = {name for name in wanted if name in self.before.clients and name in members}
        return sorted(known - self.received.keys())

    def _absent(self) -> list[tuple[str, Known]]:
        """Return the missing clients that may still come back, and what is known of them."""
        known = [(name, self.before.clients[name]) for name in self._expected()]
        patience = self.missing.patience
        return [(name, one) for name, one in known if patience is None or one.silent < patience]

    def _weight(self, known: Known) -> float:
        return known.weight if self.weighted else 1.0

    def _keep(self, name: str, arrays: NamedArrays) -> None:
        if self.memory is not None:
            digest = hashlib.blake2b(flatten(arrays).astype("<f4").tobytes(), digest_size=16).digest()
            self.memory.put(name, arrays, digest)

    def _compared(self, upload: Upload) -> NamedArrays:
        """Return what of an upload is compared: its update, or the sparse model that results from it."""
        update = upload.arrays or {}
        if self.missing.similarity == "cosine":
            return update
        model = add(self.params, update)
        return model if upload.mask is None else {name: model[name] * upload.mask[name] for name in model}

    def _kept(self, upload: Upload) -> NDArray[np.bool_] | None:
        return self.cohort.owned.get(upload.submodel) if upload.mask is None else flatten_mask(upload.mask)
