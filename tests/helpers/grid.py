"""An in-process Grid: real Flower messages, really serialised, milliseconds per round; and a clock for it."""

from __future__ import annotations

from fedkit.in_process import InProcessGrid

__all__ = ["InProcessGrid", "VirtualTime"]


class VirtualTime:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
