"""The adapters received in a round, in two passes: first find their clusters, then yield them by cluster.

The first pass keeps a short row for each adapter. It also keeps the adapters' arrays while these take at most
`KEPT` bytes in all; beyond, an upload is decoded once more when its cluster is aggregated. So memory grows only
with the number of adapters, not with their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.evidence import WIDTH, Sums, compared, features_from_text, slot_name, summed, told
from fedkit.aggregation.identities import Assignment
from fedkit.aggregation.kmeans import Points, distances
from fedkit.aggregation.lazy import LazyState
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.aggregation.signatures import Row, Signatures
from fedkit.aggregation.slots import count_slots, split_slots
from fedkit.aggregation.tasks import Tasks, overlong
from fedkit.arrays import Mask, NamedArrays, add, num_values, squared_norm, unflatten

Found: TypeAlias = tuple[Points, list[int]]
"""One row per adapter, and the cluster of each."""

KEPT: Final = 2**27
"""Bytes of arrays that are kept from the first pass to the second, at most."""


@dataclass(frozen=True, slots=True)
class Seen:
    """The adapters of one round, and the cluster of each."""

    clients: Sequence[str]  # one entry per adapter, here and below
    slots: Sequence[int]
    points: Points  # one row each: `fedkit.aggregation.signatures`
    labels: Sequence[int]  # the cluster of each
    aside: NDArray[np.bool_]  # whether it is set aside, and not aggregated
    evidence: Sums = field(default_factory=dict)  # of all slots ever heard from, as far as it is known

    def assignment(self) -> dict[str, tuple[int, ...]]:
        """Return the clusters of each client's slots."""
        found: dict[str, tuple[int, ...]] = {}
        for client, label in zip(self.clients, self.labels, strict=True):
            found[client] = (*found.get(client, ()), label)
        return found


@dataclass(frozen=True, slots=True)
class Slot:
    """One adapter that arrived."""

    number: int  # the index of its upload
    slot: int
    start: NamedArrays  # the adapter that training started from


class Arrivals:
    """Collects the uploads of a round, finds the clusters of their adapters, and yields them by cluster.

    Parameters
    ----------
    tasks : Tasks
        The rules that decide which adapters are for the same task.
    clusters : Sequence[NamedArrays]
        The current adapter of each cluster.
    lazy : LazyState, optional
        What the server has from each slot, if uploads are added to that; None: an upload is the whole update.
    evidence : Sums, optional
        What is known of slots besides this round's adapters.
    """

    def __init__(
        self,
        tasks: Tasks,
        clusters: Sequence[NamedArrays],
        lazy: LazyState | None,
        evidence: Sums | None = None,
    ) -> None:
        self.tasks, self.clusters, self.lazy = tasks, clusters, lazy
        self._signatures = Signatures(tasks.signature)
        for adapter in clusters:
            self._signatures.add(adapter)
        self._evidence = evidence or {}
        self._told: list[Row | None] = []  # None: nothing new
        self._uploads: list[Upload] = []
        self._silent: dict[str, Upload] = {}
        self._slots: list[Slot] = []
        self._lengths: list[float] = []
        self._kept = 0
        self._seen: Seen | None = None

    def add(self, upload: Upload, sent: NamedArrays) -> None:
        """Add one upload, given what its client was sent."""
        if upload.arrays is None:
            self._silent[upload.client_id] = upload
            return
        num_slots = count_slots(upload.arrays)
        updates, starts = split_slots(upload.arrays, num_slots), split_slots(sent, num_slots)
        features = (
            [None] * num_slots if upload.features is None else features_from_text(upload.features, num_slots)
        )
        for slot, (start, update) in enumerate(zip(starts, updates, strict=True)):
            whole = self._whole(upload, slot, update)
            by_updates = self.tasks.evidence == "updates"
            self._told.append(told(start, whole, self.tasks.signature) if by_updates else features[slot])
            if self.tasks.evidence in ("adapters", "auto"):
                self._signatures.add(add(start, whole))
            self._lengths.append(math.sqrt(squared_norm(whole)))
            self._slots.append(Slot(len(self._uploads), slot, start))
        self._kept += 4 * num_values(upload.arrays)
        if self._kept > KEPT and upload.again is not None:
            upload = replace(upload, arrays=None, mask=None)
        self._uploads.append(upload)

    def cluster(self, before: Assignment) -> Seen:
        """Return all adapters with their clusters, given the clusters that slots were in before."""
        clients = [self._uploads[one.number].client_id for one in self._slots]
        slots = [one.slot for one in self._slots]
        names = [slot_name(client, slot) for client, slot in zip(clients, slots, strict=True)]
        aside = overlong(self._lengths) if self.tasks.screened else np.zeros(len(clients), np.bool_)
        evidence = self._gathered(names, aside)
        found = self._by_evidence(names, evidence, before)
        points, labels = found or self._by_adapters(clients, aside, before)
        self._seen = Seen(clients, slots, points, labels, aside, evidence)
        return self._seen

    def _gathered(self, names: Sequence[str], aside: NDArray[np.bool_]) -> Sums:
        """Return what is known of each slot, this round's uploads included."""
        evidence, kind = dict(self._evidence), self.tasks.evidence
        for name, row, odd in zip(names, self._told, aside, strict=True):
            if kind in ("features", "auto") and row is not None:
                evidence[name] = (1, row)
            elif kind == "updates" and row is not None and not odd:
                evidence[name] = summed(evidence.get(name), row)
            elif kind in ("features", "updates") and name not in evidence:
                evidence[name] = (0, np.zeros((2, WIDTH), np.float32))
        return evidence

    def _by_evidence(self, names: Sequence[str], evidence: Sums, before: Assignment) -> Found | None:
        """Return rows and clusters by what is known of all slots; None: cluster this round's adapters instead."""
        if self.tasks.evidence == "adapters" or not evidence or not evidence.keys() >= set(names):
            return None
        tasks = replace(self.tasks, evidence="features") if self.tasks.evidence == "auto" else self.tasks
        points, former = compared(evidence, before, len(self.clusters))
        clients = [name.rpartition("#")[0] for name in evidence]
        labels = tasks.label(clients, points, former)
        if not self.tasks.apart(clients, points, labels):
            return None
        places = {name: number for number, name in enumerate(evidence)}
        chosen = [places[name] for name in names]
        return points[chosen], [labels[i] for i in chosen]

    def _by_adapters(self, clients: Sequence[str], aside: NDArray[np.bool_], before: Assignment) -> Found:
        """Return rows and clusters by the adapters of this round."""
        rows = self._signatures.rows()
        former, points = rows[: len(self.clusters)], rows[len(self.clusters) :]
        held = sorted({label for labels in before.values() for label in labels})
        labels = np.zeros(len(clients), np.int64)
        if len(clients):
            counted = [client for client, odd in zip(clients, aside, strict=True) if not odd]
            labels[~aside] = self.tasks.label(counted, points[~aside], former, held)
        for number in np.flatnonzero(aside).tolist():
            known = before.get(clients[number], ())
            slot = self._slots[number].slot
            nearest = int(distances(points[number : number + 1], former).argmin())
            labels[number] = known[slot] if slot < len(known) else nearest
        return points, [int(label) for label in labels]

    def uploads(self, k: int, cohort: Cohort) -> Iterator[Upload]:
        """Yield the uploads of cluster `k`, one per slot, each an update of the cluster's adapter."""
        seen, numbers = self._seen, cohort.members or {}
        if seen is None:
            return
        for one, label, odd in zip(self._slots, seen.labels, seen.aside, strict=True):
            if label == k and not odd:
                upload = self._uploads[one.number]
                name = slot_name(upload.client_id, one.slot)
                arrays, mask = self._open(one.number)[one.slot]
                if self.lazy is None:
                    own = cohort.owned.get(upload.submodel)
                    kept = unflatten(own, like=one.start) if mask is None and own is not None else mask
                    arrays = _moved(arrays, kept, one.start, self.clusters[k])
                yield replace(upload, client_id=name, node_id=numbers[name], arrays=arrays, mask=mask)
        for name, number in numbers.items() if self._silent else ():
            silent = self._silent.get(name.rpartition("#")[0])
            if silent is not None:
                yield replace(silent, client_id=name, node_id=number)

    def _open(self, number: int) -> list[tuple[NamedArrays, Mask | None]]:
        """Return the arrays and the mask of each slot of an upload."""
        upload = self._uploads[number]
        arrays, mask = upload.arrays, upload.mask
        if arrays is None and upload.again is not None:
            arrays, mask = upload.again()
        num_slots = count_slots(arrays or {})
        masks: list[Mask | None] = [None] * num_slots if mask is None else [*split_slots(mask, num_slots)]
        return list(zip(split_slots(arrays or {}, num_slots), masks, strict=True))

    def _whole(self, upload: Upload, slot: int, update: NamedArrays) -> NamedArrays:
        """Return a slot's adapter less its start: its upload, plus what a lazy server already had from it."""
        if self.lazy is None or upload.fresh:
            return update
        held = self.lazy.memory.get(slot_name(upload.client_id, slot))
        return update if held is None else add(held, update)


def _moved(update: NamedArrays, mask: Mask | None, start: NamedArrays, to: NamedArrays) -> NamedArrays:
    """Return the update of `to` that has the same result as `update` has on `start`, at the entries it covers."""
    moved = {name: (start[name] - to[name]) + array for name, array in update.items()}
    return moved if mask is None else {name: np.where(mask[name], array, 0) for name, array in moved.items()}
