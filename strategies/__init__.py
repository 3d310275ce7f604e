"""Flower strategies: the server half of each scheme."""

from fedkit.aggregation.missing import Missing
from fedkit.limits import Limits
from fedkit.row_masks import RowMask

from .aquila import Aquila
from .base import UpdateStrategy
from .budget import Budget
from .by_name import STRATEGIES, build
from .error_feedback import ErrorFeedback
from .marina import Marina
from .plain import Plain
from .safari import Safari
from .tac import Tac
from .terms import Terms

__all__ = [
    "STRATEGIES",
    "Aquila",
    "Budget",
    "ErrorFeedback",
    "Limits",
    "Marina",
    "Missing",
    "Plain",
    "RowMask",
    "Safari",
    "Tac",
    "Terms",
    "UpdateStrategy",
    "build",
]
