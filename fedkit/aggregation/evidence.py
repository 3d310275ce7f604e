"""Evidence of a slot's task: the adapter it sent, all updates that it ever sent, or its examples' features.

==============  ==============================================================================================
evidence        what of a slot is clustered
==============  ==============================================================================================
``"adapters"``  the adapter of this round, as FL-TAC has it: `fedkit.aggregation.signatures`
``"updates"``   the sum of its updates of all rounds so far, the t-th weighted by 1/t
``"features"``  the mean features of its examples in the frozen model, sent once
``"auto"``      features, if all slots of the round have them and their clusters are clear; else adapters
==============  ==============================================================================================

All but the adapters are our own. An adapter is the adapter of its cluster, which its slot started from, plus a
small update: a slot that was put into a wrong cluster stays near it. But a slot's task never changes, so what its
updates have in common adds up over the rounds, while the noise of a few local steps does not, and the start is not
in the sum. A slot thus finds its cluster in a later round, and from then on starts from that cluster's adapter.
This needs slots that keep their tasks. What also adds up is how a client's data differ from those of other clients
with the same task; once an adapter is trained, updates show nothing else. So the first updates weigh most. Rows
that are mostly noise are clustered by `fedkit.aggregation.alike`.

Features show which texts or images a task is about, from the first round on and however short training is. They
are the mean input of the model's head while the slot is trained for the first time, up to 1.4 kB
(`fedkit.clients.features`). Two tasks on the same examples have the same features, which then cannot tell them
apart, and "auto" goes by the adapters (`fedkit.aggregation.tasks.Tasks.apart`). It also goes by the adapters where
examples differ more between clients than between tasks, if clients have several tasks; if each client has only
one, features tell clients apart. Features also show the server what the mean example of a slot is like, about
which updates say less; Flower's `LocalDpMod` does not cover them. Another method that clusters clients by
statistics of their data, sent before all training: S. Vahidian et al., "Efficient Distribution Similarity
Identification in Clustered Federated Learning via Principal Angles Between Client Data Subspaces", AAAI 2023.

For each slot the server keeps one row for its LoRA factors and one for all other arrays, the head. A row is exact
up to `WIDTH` values, else sketched; sketching is linear, so a sum of sketches is the sketch of the sum. Since some
clients answer more often than others, sums are compared by direction: the mean over all known slots, outliers left
out, is subtracted from each row, and the rest is scaled to unit length. So the head, whose updates are larger,
does not outweigh the factors. Absent slots are clustered as well, in place of the clusters' current adapters.
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
"""How many updates a slot sent, and their sum, shape (2, `WIDTH`); for features, 1 and the row."""
Sums: TypeAlias = Mapping[str, Sum]
"""The sum of each slot, by slot name."""

WIDTH: Final = 1024
"""Values of each of a slot's two rows."""
FEATURES: Final = "features"
"""The name of features in the server's instructions, the app's reply and the client's report."""
ASKED: Final[Mapping[str, str]] = {"features": "must", "auto": "may"}
"""What the instructions say about features, by evidence: "must" if a reply without them is refused."""
MOST: Final = 512
"""Features of a slot, at most; longer ones are sketched."""
FAR: Final = 4.0
"""A row this many times as far from the elementwise median as the median row is left out of the mean."""


def slot_name(client: str, slot: int) -> str:
    """Return the name of a slot, as aggregations inside clusters know it."""
    return f"{client}#{slot}"


def told(start: NamedArrays, update: NamedArrays, kind: Signature) -> Row:
    """Return one update as evidence of its slot's task, shape (2, `WIDTH`)."""
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
    """Return the features of a client's slots, one row each, encoded for its report: float16, base64."""
    rows = means if means.shape[1] <= MOST else np.stack([sketch(row, MOST) for row in means])
    largest = np.finfo(np.float16).max  # larger values are clipped to this
    return b64encode(np.clip(rows, -largest, largest).astype("<f2").tobytes()).decode()


def features_from_text(text: object, num_slots: int) -> list[Row]:
    """Return the features of each of a client's slots from its report, shape (2, `WIDTH`) each.

    Raises
    ------
    ReplyError
        If the text is not one row of finite values for each slot.
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
    """Return a row for each slot, and for each cluster the mean row of its last members; zeros if it had none."""
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
    """Return the mean of the rows, shape (2, `WIDTH`), without those that are far from the elementwise median."""
    if not len(stacked):
        return np.zeros(stacked.shape[1:])
    lengths = np.linalg.norm(stacked - np.median(stacked, axis=0), axis=2)
    usual = lengths <= FAR * np.median(lengths, axis=0)
    sums: NDArray[np.float64] = np.where(usual[:, :, None], stacked, 0).sum(axis=0)
    sums /= usual.sum(axis=0)[:, None]
    return sums
