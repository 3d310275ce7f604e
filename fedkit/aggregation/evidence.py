"""What tells which task a slot is for: the adapter it sent, all updates that it ever sent, or what it is about.

==============  ==============================================================================================
evidence        what of a slot is clustered
==============  ==============================================================================================
``"adapters"``  the adapter of this round, as FL-TAC has it: `fedkit.aggregation.signatures`
``"updates"``   the sum of its updates of all rounds so far, the t-th weighted by 1/t
``"features"``  the mean of what its examples are to the frozen model, sent once
``"auto"``      features, if all slots of the round have them and their clusters are clear; else adapters
==============  ==============================================================================================

All but the adapters are ours. An adapter is the one that its slot started from, its cluster's, and a small
update: a slot that was put into a wrong cluster stays near it. But a slot's task never changes, so what its
updates have in common adds up over the rounds, while the noise of a few local steps does not, and the start is not
in the sum. A slot thus finds its cluster later, and from then on starts from that cluster's adapter. It needs
slots that keep their tasks. What adds up, too, is how a client's data differ from those of others with its task:
once an adapter is trained, this is all that updates say. So the first ones weigh most. Rows that are mostly noise
are clustered by `fedkit.aggregation.alike`.

Features say which texts or images a task is about, from the first round on and however short training is. They
are the mean of what the model's head is given while the slot is trained for the first time, up to 1.4 kB
(`fedkit.clients.features`). Two tasks about the same examples have the same features: nothing tells them apart
then, and "auto" goes by the adapters (`fedkit.aggregation.tasks.Tasks.apart`). So it does where clients' examples
differ more than tasks' do, if clients have several tasks; if each has only one, features tell clients apart. And
the server learns what the mean example of a slot is like, of which updates say less; Flower's `LocalDpMod` does
not cover it. Clients that are clustered by statistics of their data, which they send before all training:
S. Vahidian et al., "Efficient Distribution Similarity Identification in Clustered Federated Learning via Principal
Angles Between Client Data Subspaces", AAAI 2023.

Of each slot the server keeps a row for its LoRA factors and one for all other arrays, the head: exact up to
`WIDTH` values, else sketched, which is linear, so that a sum of sketches is the sketch of the sum. Sums are
compared by direction, for clients answer more often or less: from each row the mean of all known slots is taken,
but of those that are far off, and what is left has unit length. So the head, whose updates are larger, does not
outweigh the factors. Slots that are absent are clustered along, in place of the clusters' present adapters.
"""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.identities import Assignment
from fedkit.aggregation.kmeans import Points
from fedkit.aggregation.lora import lora_pairs
from fedkit.aggregation.signatures import Row, Signature, signature, sketch
from fedkit.arrays import NamedArrays, add
from fedkit.errors import ReplyError

Evidence: TypeAlias = Literal["auto", "adapters", "updates", "features"]
Sum: TypeAlias = tuple[int, Row]
"""How many updates a slot sent, and their sum, shape (2, `WIDTH`); of features, 1 and the row."""
Sums: TypeAlias = Mapping[str, Sum]
"""Of each slot, by name."""

WIDTH: Final = 1024
"""Values of each of a slot's two rows."""
FEATURES: Final = "features"
"""What the server's instructions, the app's reply and the report call them."""
ASKED: Final[Mapping[str, str]] = {"features": "must", "auto": "may"}
"""What instructions say of them, by evidence: whether a reply without any is refused."""
MOST: Final = 512
"""Features of a slot, at most; more are sketched."""
FAR: Final = 4.0
"""A row that is this many times as far from the middle as the median one does not count in the mean."""


def slot_name(client: str, slot: int) -> str:
    """Return the name of a slot, as aggregations inside clusters know it."""
    return f"{client}#{slot}"


def told(start: NamedArrays, update: NamedArrays, kind: Signature) -> Row:
    """Return what one update says of its slot, shape (2, `WIDTH`)."""
    factors = {name for pair in lora_pairs(start) for name in pair}
    rows = np.zeros((2, WIDTH), np.float32)
    for row, names in zip(rows, (factors, start.keys() - factors), strict=True):
        part = {name: update[name] for name in update if name in names}
        if part:
            change = signature(part, kind)
            if kind == "product" and names is factors:
                before = {name: start[name] for name in part}
                change = signature(add(before, part), kind) - signature(before, kind)
            short = change if change.size <= WIDTH else sketch(change, WIDTH)
            row[: short.size] = short
    return rows


def summed(known: Sum | None, row: Row) -> Sum:
    """Return a slot's sum with one more update."""
    count, before = known or (0, np.zeros_like(row))
    return count + 1, before + row / np.float32(count + 1)


def features_to_text(means: NDArray[np.float32]) -> str:
    """Return the features of a client's slots, one row each, as its report says them: float16, base64."""
    rows = means if means.shape[1] <= MOST else np.stack([sketch(row, MOST) for row in means])
    largest = np.finfo(np.float16).max  # what is beyond, is that
    return b64encode(np.clip(rows, -largest, largest).astype("<f2").tobytes()).decode()


def features_from_text(text: object, num_slots: int) -> list[Row]:
    """Return what a report says of each of its client's slots, shape (2, `WIDTH`).

    Raises
    ------
    ReplyError
        If that is not one row of finite values for each.
    """
    try:
        values = np.frombuffer(b64decode(str(text), validate=True), "<f2").astype(np.float32)
        given = values.reshape(num_slots, -1)
    except ValueError:
        given = np.zeros((num_slots, 0), np.float32)
    if not 1 <= given.shape[1] <= MOST or not np.isfinite(given).all():
        raise ReplyError(f"features: expected 1 to {MOST} finite values for each of {num_slots} slots.")
    rows = np.zeros((num_slots, 2, WIDTH), np.float32)
    rows[:, 0, : given.shape[1]] = given
    return list(rows)


def compared(sums: Sums, before: Assignment, num_clusters: int) -> tuple[Points, Points]:
    """Return a row for each slot, and for each cluster the mean of those that were in it; nobody's: zeros."""
    stacked = np.array([row for _, row in sums.values()], np.float64).reshape(-1, 2, WIDTH)
    centred = stacked - _middle(stacked)
    lengths = np.linalg.norm(centred, axis=2, keepdims=True)
    points = (centred / np.where(lengths > 0, lengths, 1.0)).reshape(-1, 2 * WIDTH)
    numbers = {name: number for number, name in enumerate(sums)}
    former = np.zeros((num_clusters, points.shape[1]))
    members: list[list[int]] = [[] for _ in range(num_clusters)]
    for client, labels in before.items():
        for slot, label in enumerate(labels):
            if (number := numbers.get(slot_name(client, slot))) is not None:
                members[label].append(number)
    for k, own in enumerate(members):
        if own:
            former[k] = points[own].mean(axis=0)
    return points, former


def _middle(stacked: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the rows, shape (2, `WIDTH`), but of those that are far from the median of each value."""
    if not len(stacked):
        return np.zeros(stacked.shape[1:])
    lengths = np.linalg.norm(stacked - np.median(stacked, axis=0), axis=2)
    usual = lengths <= FAR * np.median(lengths, axis=0)
    sums: NDArray[np.float64] = np.where(usual[:, :, None], stacked, 0).sum(axis=0)
    sums /= usual.sum(axis=0)[:, None]
    return sums
