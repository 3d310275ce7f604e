"""Flower strategies, the server's half of each scheme."""

from .aquila import Aquila
from .base import UpdateStrategy
from .build import STRATEGIES, build
from .safari import Safari

__all__ = ["STRATEGIES", "Aquila", "Safari", "UpdateStrategy", "build"]
