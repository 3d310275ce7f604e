"""The interface of all quantizers: real numbers ⇄ integer levels.

A `Quantizer` turns a group of values into a `Group` and its levels. The group is what a receiver must know to turn
the levels back into values; its `grid` number says on the wire how to read it. So decoding needs no quantizer: the
bytes describe themselves.

=====================  ============================================  =====================================
quantizer              in one line                                   file
=====================  ============================================  =====================================
`EntropyConstrained`   ours: least error at a rate the user sets     `entropy_constrained.py`, `signs.py`
`ZeroMidTread`         AQUILA's level b*, with a zero                `quantize.py`
`AquilaMidTread`       AQUILA as published                           `quantize.py`
`Qsgd`                 unbiased random rounding                      `baselines.py`
`Sign`                 1 bit, for error feedback                     `baselines.py`
`Blocks`               k bits, a scale per block                     `baselines.py`
`Eden`                 random rotation, then 1 to 4 bits             `rotation.py`
=====================  ============================================  =====================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import ClassVar, Final, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import ConfigError, WireFormatError

MAX_BITS: Final = 16
_LARGE: Final = 2**19  # values; of more, only a part is looked at to decide how to code all
_RUN: Final = 2**12  # values looked at together
CHUNK: Final = 2**15  # values that fit a core's cache: as many are computed in float64 at a time
MAX_FLOAT32: Final = float(np.finfo(np.float32).max)

Take: TypeAlias = Callable[[int], memoryview]
"""Takes the given number of bytes off a frame; raises WireFormatError if there are fewer."""


class Group(Protocol):
    """What turns the levels of a group of values back into values."""

    grid: ClassVar[int]  # its number on the wire, whose meaning never changes

    @property
    def bits(self) -> int:
        """Width of a packed level, 0 to 16."""

    @property
    def num_levels(self) -> int:
        """How many levels there are."""

    def to_bytes(self) -> bytes:
        """Return the group as sent; its number of values is sent elsewhere."""

    @classmethod
    def read(cls, take: Take, sizes: Sequence[int]) -> Self:
        """Return the group of arrays of `sizes` values; inverse of `to_bytes`. Raises WireFormatError."""

    def dequantize(self, levels: NDArray[np.uint16]) -> NDArray[np.float32]:
        """Return the values, the same on every machine. Raises WireFormatError for an invalid level."""


class Quantized(NamedTuple):
    """One group of values, as integers."""

    group: Group
    levels: NDArray[np.uint16]


class Quantizer(Protocol):
    """Values to levels."""

    per_array: ClassVar[bool]  # whether each array is a group of its own; else all are one

    def quantize(self, parts: Sequence[NDArray[np.float32]], rng: np.random.Generator) -> Quantized:
        """Return the values of one array, or of all, each of shape (count,), as the levels of one group."""


def join(parts: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Return the values of all parts as one vector."""
    return parts[0] if len(parts) == 1 else np.concatenate([np.zeros(0, np.float32), *parts])


def tame(parts: Sequence[NDArray[np.float32]]) -> tuple[Sequence[NDArray[np.float32]], int]:
    """Return the parts times ``2**-power``, and the power, such that no float32 sum or square over- or underflows.

    The power is 0, and nothing is copied, unless the largest value is below 1e-15 or above 1e15.
    """
    peak = max((float(max(part.max(), -part.min())) for part in parts if part.size), default=0.0)
    if peak == 0 or 1e-15 < peak < 1e15:
        return parts, 0
    power = math.frexp(peak)[1]
    return [np.ldexp(part, -power) for part in parts], power


def thinned(parts: Sequence[NDArray[np.float32]]) -> Sequence[NDArray[np.float32]]:
    """Return a sample of `parts` of at most about 2**19 values in all: evenly spaced chunks of each part."""
    step = sum(part.size for part in parts) // _LARGE
    if step < 2:
        return parts
    picked = [[part[start : start + _RUN] for start in range(0, part.size, step * _RUN)] for part in parts]
    return [np.concatenate([part[:0], *runs]) for part, runs in zip(parts, picked, strict=True)]


def look_up(
    levels: NDArray[np.uint16], top: int, value_of: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.float32]:
    """Return the values of levels 0 to `top`: computed in float64, clipped to the range of float32, rounded once.

    Raises
    ------
    WireFormatError
        If a level lies above `top`.
    """
    if levels.size and int(levels.max()) > top:
        raise WireFormatError(f"a level lies outside the grid of {top + 1} levels.")
    values = np.empty(levels.size, np.float32)
    table = _rounded(value_of(np.arange(top + 1, dtype=np.float64))) if top < 2**12 else None
    for start in range(0, levels.size, CHUNK):
        part = levels[start : start + CHUNK]
        if table is None:
            values[start : start + CHUNK] = _rounded(value_of(part.astype(np.float64)))
        else:
            np.take(table, part, out=values[start : start + CHUNK], mode="clip")
    return values


def _rounded(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return np.clip(values, -MAX_FLOAT32, MAX_FLOAT32).astype(np.float32)


def check_bits(min_bits: int, max_bits: int) -> None:
    """Raise ConfigError unless ``1 <= min_bits <= max_bits <= 16``."""
    if not 1 <= min_bits <= max_bits <= MAX_BITS:
        raise ConfigError(f"bits: expected 1 <= min_bits <= max_bits <= {MAX_BITS}, got {min_bits}, {max_bits}.")
