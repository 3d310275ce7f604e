"""Flower strategies, the server's half of each scheme."""

from .aquila import Aquila
from .base import UpdateStrategy
from .build import STRATEGIES, build

__all__ = ["STRATEGIES", "Aquila", "UpdateStrategy", "build"]
