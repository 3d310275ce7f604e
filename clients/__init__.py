"""Flower mods: the client half of each scheme. The code that needs torch is in `adapters` and `rm_lora`."""

from .aquila import AquilaMod
from .base import UpdateMod
from .error_feedback import ErrorFeedbackMod
from .kept import kept
from .safari import SafariMod
from .tac import TacMod
from .worker import WarmWorker

__all__ = ["AquilaMod", "ErrorFeedbackMod", "SafariMod", "TacMod", "UpdateMod", "WarmWorker", "kept"]
