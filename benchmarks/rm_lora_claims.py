"""The criteria for RM-LoRA to count as reproduced, and whether they hold.

The bounds are those of a prototype, not of the paper, whose tables could not be read. The paper claims better
generalization at the same or a smaller budget of trained parameters. A budget is counted as in the released code,
by the components that a step trains: RM-LoRA of r 8, k 4 has the budget of LoRA of r 4, but stores as much as LoRA
of r 8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import sqrt
from statistics import mean, stdev
from typing import NamedTuple

from scipy.stats import t

from benchmarks.harness import Row

LORA4, LORA8, LORA16 = "LoRA r4", "LoRA r8", "LoRA r16"
PENALTY, MASK, BOTH = "penalty alone", "mask alone", "RM-LoRA"
NEAR, RANKS = 0.2, 1.3  # points below LoRA of equal storage; times its effective rank
ALL = "all tasks"

Seeds = Mapping[int, Row]  # of one task and arm, by seed
Found = Mapping[str, Mapping[str, Seeds]]  # by task and arm


class Interval(NamedTuple):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return that of independent values, by Student's t; of a single one unbounded."""
        middle, n = mean(values), len(values)
        half = float(t.ppf(0.975, n - 1)) * stdev(values) / sqrt(n) if n > 1 else float("inf")
        return cls(middle, middle - half, middle + half)

    def __str__(self) -> str:
        known = self.high < float("inf")
        return f"{self.mean:+.2f}" + (f" [{self.low:+.2f}, {self.high:+.2f}]" if known else "")


def difference(ours: Seeds, theirs: Seeds, key: str = "accuracy") -> Interval:
    """Return how many points one is above the other, seed by seed."""
    return Interval.of(
        [100 * (ours[seed][key] - theirs[seed][key]) for seed in sorted(ours.keys() & theirs.keys())]
    )


def line(arm: str, arms: Mapping[str, Seeds]) -> Row:
    """Return the line of one arm: means over the seeds."""
    rows = list(arms[arm].values())
    first = {key: rows[0][key] for key in ("rate", "parameters", "trained")}
    values = [100 * row["accuracy"] for row in rows]
    spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
    found = {"arm": arm, "seeds": len(rows), **first, "accuracy": f"{mean(values):.2f}{spread}"}
    found |= {"gap": 100 * mean(row["gap"] for row in rows), "rank": mean(row["rank"] for row in rows)}
    if "matthews" in rows[0]:
        found["matthews"] = mean(row["matthews"] for row in rows)
    for key, baseline in (("budget", LORA4), ("storage", LORA8)):
        if baseline in arms and baseline != arm:
            found[key] = str(difference(arms[arm], arms[baseline]))
    return found


def pooled(found: Found) -> dict[str, Seeds]:
    """Return the means over all tasks, of the arms and seeds that all of them have."""
    arms = set.intersection(*(set(arms) for arms in found.values()))
    total: dict[str, Seeds] = {}
    for arm in arms:
        seeds = set.intersection(*(set(arms[arm]) for arms in found.values()))
        total[arm] = {
            seed: {key: mean(arms[arm][seed][key] for arms in found.values()) for key in ("accuracy", "rank")}
            for seed in seeds
        }
    return {arm: seeds for arm, seeds in total.items() if seeds}


def claims(found: Found) -> list[Row]:
    """Return a row for each claim about each task, and about their mean if there are several."""
    rows = [row for task, arms in found.items() for row in _of(task, arms)]
    return rows + (list(_of(ALL, pooled(found))) if len(found) > 1 else [])


def _of(task: str, arms: Mapping[str, Seeds]) -> Iterator[Row]:
    checks: list[tuple[str, str, str, str, Callable[[Interval], bool]]] = [
        ("equal budget: {} − {}, points", BOTH, LORA4, "interval above 0", lambda d: d.low > 0),
        ("equal storage: {} − {}, points", BOTH, LORA8, f"≥ −{NEAR}", lambda d: d.mean >= -NEAR),
        ("the mask's share: {} − {}, points", BOTH, PENALTY, "interval above 0", lambda d: d.low > 0),
        ("the penalty's share: {} − {}, points", BOTH, MASK, "interval above 0", lambda d: d.low > 0),
    ]
    for claim, ours, theirs, bound, holds in checks:
        if {ours, theirs} <= arms.keys():
            found = difference(arms[ours], arms[theirs])
            yield _row(f"{task}: {claim.format(ours, theirs)}", bound, str(found), holds(found))
    if {BOTH, LORA8} <= arms.keys():
        ours, theirs = (mean(row["rank"] for row in arms[arm].values()) for arm in (BOTH, LORA8))
        ratio = ours / theirs if theirs else float("nan")
        yield _row(f"{task}: effective rank, {BOTH} / {LORA8}", f"≥ {RANKS}", f"{ratio:.2f}", ratio >= RANKS)


def _row(claim: str, bound: str, found: str, holds: bool) -> Row:
    return {"claim": claim, "bound": bound, "found": found, "holds": "yes" if holds else "no"}
