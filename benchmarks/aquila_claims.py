"""The criteria for AQUILA to count as reproduced, and whether they hold.

The bounds are those of a prototype on the same task (digits with an MLP of 4,810 parameters), not of the paper,
whose own tables could not be read. From the paper there is only the headline, around 60 % fewer bits than other
methods at the same accuracy; here, between 50 and 70 % fewer on average.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean

from benchmarks.harness import Row

FEDAVG, AQUILA = "FedAvg", "Aquila(), as it comes"
LITERAL, TWO_BITS, ZERO = "AQUILA as published", "AQUILA, 2 bits or more", "AQUILA, grid with a zero"
QSGD, ADAQUANT, LAQ, MARINA = "QSGD", "AdaQuantFL", "LAQ", "MARINA"

BASELINES = (QSGD, ADAQUANT, LAQ, MARINA)
ALL, BATCHES = "digits, all examples", "digits, batches of 32"
NEAR = 0.005  # of FedAvg's accuracy
HEADLINE = (50, 70)  # per cent fewer
BOUNDS = [  # task, arm, baseline, and the largest share of its uplink
    (BATCHES, LITERAL, QSGD, 0.60),
    (BATCHES, TWO_BITS, QSGD, 0.60),
    (BATCHES, ZERO, QSGD, 0.60),
    (ALL, TWO_BITS, QSGD, 0.15),
    (ALL, ZERO, QSGD, 0.15),
    (ALL, ZERO, LAQ, 0.85),
]

Lines = Mapping[str, Row]  # of one task, by arm


def claims(found: Mapping[str, Lines]) -> list[Row]:
    """Return a row for each claim about the tasks that were run, and whether it holds, counting in two ways."""
    return [*_bounds(found), *_headlines(found)]


def _bounds(found: Mapping[str, Lines]) -> Iterator[Row]:
    for task, arm, baseline, bound in BOUNDS:
        lines = found.get(task, {})
        if not {arm, baseline} <= lines.keys():
            continue
        near = lines[arm]["final"] >= lines[FEDAVG]["final"] - NEAR
        row = {"claim": f"{task}: {arm} / {baseline}", "bound": f"≤ {100 * bound:.0f} %"}
        row |= {"accuracy": 100 * (lines[arm]["final"] - lines[FEDAVG]["final"])}
        for way, key in {"paper": "total-paper", "frames": "total"}.items():
            share = lines[arm][key] / lines[baseline][key]
            row |= {way: f"{100 * share:.1f} %", f"{way}-holds": "yes" if near and share <= bound else "no"}
        yield row


def _headlines(found: Mapping[str, Lines]) -> Iterator[Row]:
    low, high = HEADLINE
    for task, lines in found.items():
        for arm in (name for name in (LITERAL, TWO_BITS, ZERO) if name in lines):
            row = {"claim": f"{task}: {arm}, fewer until target", "bound": f"{low} to {high} %"}
            row |= {"accuracy": 100 * (lines[arm]["final"] - lines[FEDAVG]["final"])}
            for way, key in {"paper": "up-paper", "frames": "up"}.items():
                if (value := saving(lines[arm], lines, key)) is not None:
                    row |= {way: f"{value:.1f} %", f"{way}-holds": "yes" if low <= value <= high else "no"}
            yield row


def saving(line: Row, lines: Lines, key: str) -> float | None:
    """Return how many per cent fewer bytes an arm takes than the baselines, on average over those that arrived."""
    others = [lines[name][key] for name in BASELINES if key in lines.get(name, {})]
    return 100 * mean(1 - line[key] / other for other in others) if key in line and others else None
