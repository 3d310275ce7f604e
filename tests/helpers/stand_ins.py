"""What counts for missing clients, written down once more: client by client and entry by entry, all of it kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedkit.aggregation.missing import Missing

Sent = tuple[np.ndarray, np.ndarray]  # an update and its mask, flat


@dataclass
class Twin:
    """A server that keeps everything that it ever saw."""

    missing: Missing
    sparse_model: bool = False
    theta: np.ndarray = field(default_factory=lambda: np.zeros(88))
    seen: list[dict[str, Sent]] = field(default_factory=list)  # what arrived, by round
    weights: dict[str, float] = field(default_factory=dict)
    cosines: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    models: dict[str, np.ndarray] = field(default_factory=dict)
    stand_ins: dict[str, str] = field(default_factory=dict)  # of the last round

    def round(self, arrived: Mapping[str, Sent], weights: Mapping[str, float]) -> None:
        """Move `theta` by what arrived."""
        self.stand_ins = {}
        if not arrived:
            return
        known = [set(r) for r in self.seen]
        everybody = set().union(*known)
        rarity = {name: self.rarity(name) if self.missing.by == "reweight" else 1.0 for name in arrived}
        items = [(weights[name] * rarity[name], *arrived[name]) for name in sorted(arrived)]
        self.observe(arrived)
        items += [
            (self.weights[name] * share, *sent)
            for name in sorted(everybody - set(arrived))
            for share, sent in self.for_missing(name, arrived)
        ]
        if self.missing.by == "reweight":
            absent = sum(self.weights[name] for name in everybody - set(arrived))
            share = sum(w for w, *_ in items) / (sum(weights[name] for name in arrived) + absent)
        else:
            share = 1.0
        if self.sparse_model:
            models = sum(w * np.where(m, self.theta + u, 0) for w, u, m in items)
            new = models / sum(w for w, *_ in items)
        else:
            owners = sum(w * m for w, _, m in items)
            total = sum(w * m * u for w, u, m in items)
            new = self.theta + np.divide(total, owners, out=np.zeros(88), where=owners > 0)
        for name, (update, _) in arrived.items():
            self.models[name] = self.theta + update
        self.theta = self.theta + share * (new - self.theta)
        self.seen.append(dict(arrived))
        self.weights.update({name: weights[name] for name in arrived})

    def rarity(self, name: str) -> float:
        """Return the mean number of rounds from answer to answer, before this round."""
        answers = [k for k, arrived in enumerate(self.seen) if name in arrived]
        return float(np.mean([1, *np.diff(answers)])) if answers else 1.0

    def observe(self, arrived: Mapping[str, Sent]) -> None:
        """Take note of who is alike."""
        for i, (u, m) in arrived.items():
            for j, (v, n) in arrived.items():
                if self.missing.similarity == "l2":
                    a, b = np.where(m, self.theta + u, 0), np.where(n, self.theta + v, 0)
                    self.cosines[i, j] = [-float(np.linalg.norm(a - b))]
                elif i != j:
                    self.add(i, j, u, v, m & n)
            before = self.last(i)
            if before is not None and self.missing.similarity == "cosine":
                self.add(i, i, u, before[0], m & before[1])

    def add(self, i: str, j: str, u: np.ndarray, v: np.ndarray, both: np.ndarray) -> None:
        """Take note of one cosine."""
        norm = np.linalg.norm(u[both]) * np.linalg.norm(v[both])
        if norm > 0:
            self.cosines.setdefault((i, j), []).append(float(u[both] @ v[both] / norm))

    def last(self, name: str) -> Sent | None:
        """Return what a client sent last."""
        return next((arrived[name] for arrived in reversed(self.seen) if name in arrived), None)

    def for_missing(self, name: str, arrived: Mapping[str, Sent]) -> Iterator[tuple[float, Sent]]:
        """Yield what a missing client counts with, if anything, and with how much of its weight."""
        own, by = self.last(name), self.missing.by
        if by == "mifa" and own is not None:
            self.stand_ins[name] = name
            yield 1.0, own
        if by != "safari":
            return
        alike = dict(self.kin(name, arrived)) if len(self.seen) >= self.missing.warmup_rounds else {}
        best = max(alike, key=lambda j: round(alike[j], 9)) if alike else None
        itself = recent(self.cosines.get((name, name), [0.0]))
        if self.missing.own and (best is None or alike[best] < itself):
            if own is not None and itself > 0:
                self.stand_ins[name] = name
                yield itself, own
        elif best is not None and (self.missing.similarity == "l2" or alike[best] > 0):
            self.stand_ins[name] = best
            update, mask = arrived[best]
            if self.missing.surrogate == "update":
                self.models[name] = self.models[name] + update
                update = self.models[name] - self.theta
            yield (1.0 if self.missing.similarity == "l2" else alike[best]), (update, mask)

    def kin(self, name: str, arrived: Mapping[str, Sent]) -> Iterator[tuple[str, float]]:
        """Yield who may stand in, and how alike they are."""
        for other in sorted(arrived):
            if (name, other) in self.cosines:
                yield other, recent(self.cosines[name, other])


def recent(values: Sequence[float]) -> float:
    """Return the mean of values, each of which counts 0.7 of its successor."""
    return float(np.average(values, weights=0.7 ** np.arange(len(values))[::-1]))


def flat(arrays: Mapping[str, Any]) -> np.ndarray:
    return np.concatenate([np.asarray(a).ravel() for a in arrays.values()])
