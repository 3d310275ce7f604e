"""Axes of plots: the positions of values, and ticks at round numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of a plot."""

    label: str
    low: float
    high: float
    written: Callable[[float], str]
    step: float = 0.0  # between two ticks; 0: the axis is logarithmic

    @classmethod
    def over(
        cls, label: str, values: Iterable[float], written: Callable[[float], str], *, zero: bool = False
    ) -> Axis:
        """Return the axis that shows all `values`, beginning and ending at a tick; `zero`: it includes 0."""
        found = list(values) or [0.0, 1.0]
        low, high = (min(0.0, *found) if zero else min(found)), max(found)
        if low == high:
            low, high = low - (0 if zero else 0.5 * (abs(low) or 1)), high + 0.5 * (abs(high) or 1)
        step = _step(high - low)
        return cls(label, step * math.floor(low / step), step * math.ceil(high / step), written, step)

    @classmethod
    def whole(cls, label: str, values: Iterable[int]) -> Axis:
        """Return the axis from the first to the last of some whole numbers."""
        found = list(values) or [0, 1]
        low, high = min(found), max(found)
        return cls(label, low, high if high > low else low + 1, "{:g}".format, max(1.0, _step(max(high - low, 1))))

    @classmethod
    def logarithmic(cls, label: str, values: Iterable[float], written: Callable[[float], str]) -> Axis:
        """Return the axis that shows all `values`, which are above 0."""
        found = list(values)
        return cls(label, min(found) / 1.15, max(found) * 1.15, written)

    def place(self, value: float) -> float:
        """Return the position of a value: 0 at the low end, 1 at the high end."""
        if not self.step:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Return some round numbers."""
        if self.step:
            first = math.ceil(self.low / self.step - 1e-9)
            return [k * self.step for k in range(first, math.floor(self.high / self.step + 1e-9) + 1)]
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for steps in ((1,), (1, 3), (1, 2, 5)):
            ticks = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
            if len(ticks) >= 3:
                break
        return ticks


def _step(span: float) -> float:
    """Return 1, 2 or 5 times a power of ten, such that 4 to 8 of them span `span`."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(k * power for k in (1, 2, 5, 10) if span / (k * power) <= 8)
