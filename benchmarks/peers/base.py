"""The interface of a peer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import NotInstalledError

Vector: TypeAlias = NDArray[np.float32]


class Coder(Protocol):
    """A codec with its knob set."""

    def encode(self, vector: Vector) -> bytes:
        """Return what the peer would send for `vector`, shape (count,)."""

    def decode(self, data: bytes, count: int) -> Vector:
        """Return the vector that the other side gets, shape (count,)."""


@dataclass(frozen=True, slots=True)
class Peer:
    """A codec and the settings that its curve is drawn through."""

    name: str
    make: Callable[[float], Coder]
    knobs: tuple[float, ...]
    knob: str  # what the knob means
    at_one_bit: float | None = None  # the knob whose speed and memory are measured, at or near 1 bit


def require(module: str, package: str) -> Any:
    """Return an imported module.

    Raises
    ------
    NotInstalledError
        If the package cannot be imported.
    """
    try:
        return import_module(module)
    except ImportError:
        raise NotInstalledError(f"pip install {package}") from None


def pack(levels: NDArray[np.integer[Any]], bits: int) -> bytes:
    """Return levels below ``2**bits`` as a dense string of bits."""
    if bits in (8, 16):
        return levels.astype(f"<u{bits // 8}").tobytes()
    if bits == 1:
        return np.packbits(levels.astype(np.bool_)).tobytes()
    spread = (levels[:, None] >> np.arange(bits)).astype(np.uint8) & 1
    return np.packbits(spread).tobytes()


def unpack(data: bytes | memoryview, count: int, bits: int) -> NDArray[np.int64]:
    """Return `count` levels; inverse of `pack`."""
    if bits in (8, 16):
        return np.frombuffer(data, f"<u{bits // 8}", count).astype(np.int64)
    spread = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits).reshape(count, bits)
    return spread.astype(np.int64) @ (1 << np.arange(bits))


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes `pack` makes."""
    return -(-count * bits // 8)
