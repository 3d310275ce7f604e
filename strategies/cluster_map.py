"""A map of TAC's adapters in each round, written as one line of JSON per round to ``clusters.jsonl``.

``{"round": 3, "adapters": [{"client": "7", "slot": 0, "cluster": 2, "x": -0.1, "y": 1.4}, ...]}``. An adapter that
was set aside also has ``"aside": true``, and is shown at the rim. Positions are the first two principal components
(K. Pearson, 1901) of the round's signatures; where these are many and long, of their sketches. If the true tasks
are given, which is for evaluation only, the line also has ``purity`` and ``ari``
(`fedkit.aggregation.identities`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.arrivals import Seen
from fedkit.aggregation.identities import Assignment, adjusted_rand_index, purity
from fedkit.aggregation.kmeans import Points
from fedkit.aggregation.signatures import sketch
from fedkit.files import put_line
from fedkit.ledger import CLUSTERS

_LARGE: Final = 512  # with more rows than this, of more values than this, components would take seconds
_RIM: Final = 1.5  # how far out adapters set aside are shown, at most, relative to the farthest other adapter


class ClusterMap:
    """Writes the map of each round's adapters.

    Parameters
    ----------
    tasks : mapping of str to sequence of int, optional
        The true task of each slot, by client id.
    """

    def __init__(self, tasks: Assignment | None) -> None:
        self.tasks = tasks
        self._axes: Points | None = None  # of the last round, so that the map does not flip over

    def put(self, folder: Path | None, server_round: int, seen: Seen | None) -> None:
        """Write the line of a round, replacing an existing one; without a folder or adapters, write nothing."""
        if folder is None or seen is None or not seen.labels:
            return
        places = np.round(self._placed(seen.points, seen.aside), 6).tolist()
        rows = zip(seen.clients, seen.slots, seen.labels, places, seen.aside.tolist(), strict=True)
        adapters = [
            {"client": client, "slot": slot, "cluster": label, "x": x, "y": y} | ({"aside": True} if aside else {})
            for client, slot, label, (x, y), aside in rows
        ]
        line: dict[str, Any] = {"round": server_round, "adapters": adapters}
        found = seen.assignment()
        if self.tasks and set(found) & set(self.tasks):
            line["ari"] = round(adjusted_rand_index(found, self.tasks), 6)
            line["purity"] = round(purity(found, self.tasks), 6)
        path = folder / CLUSTERS
        path.touch()
        put_line(path, line, key="round")

    def _placed(self, points: Points, aside: NDArray[np.bool_]) -> NDArray[np.float64]:
        """Return two coordinates for each row."""
        if min(points.shape) > _LARGE:
            points = np.stack([sketch(row.astype(np.float32)) for row in points]).astype(np.float64)
        centred = points - points[~aside].mean(axis=0)
        axes = np.linalg.svd(centred[~aside], full_matrices=False)[2][:2]
        axes = np.vstack([axes, np.zeros((2 - len(axes), axes.shape[1]))])
        if self._axes is not None and self._axes.shape == axes.shape:
            axes *= np.where((axes * self._axes).sum(axis=1, keepdims=True) < 0, -1.0, 1.0)
        self._axes, places = axes, centred @ axes.T
        out = np.linalg.norm(places, axis=1)
        rim = _RIM * out[~aside].max()
        places[aside & (out > rim)] *= (rim / out[aside & (out > rim)])[:, None]
        return np.asarray(places)
