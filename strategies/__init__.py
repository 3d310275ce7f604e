"""Flower strategies, the server's half of each scheme."""

from .aquila import Aquila
from .base import UpdateStrategy
from .build import build

__all__ = ["Aquila", "UpdateStrategy", "build"]
