"""Flower mods, the client's half of each scheme; the torch side is in `adapters` and `rm_lora`."""

from .aquila import AquilaMod
from .base import UpdateMod

__all__ = ["AquilaMod", "UpdateMod"]
