"""Which options of a strategy can be combined, and why others cannot."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fedkit.aggregation.missing import Missing
from fedkit.errors import ConfigError
from fedkit.skipping import SkipRule

from .budget import Budget
from .downlink import Downlink
from .parts import PRODUCTS, LoraMode

if TYPE_CHECKING:
    from .asking import Asking

REMEMBERS: Final = "what is remembered from earlier rounds refers to factors that the next SVD replaces."
RESTS: Final = (
    "the last update of a client is of rows that are inactive now. Use missing='safari', with `own` unset."
)
ROWS_MOVE: Final = (
    "the step is along the sum of all uploads so far, so inactive rows would move by uploads of earlier rounds. "
    "Use Plain or ErrorFeedback."
)


def composed(strategy: Asking, missing: Missing, downlink: Downlink, budget: Budget | None) -> Missing:
    """Return `missing`, adapted to the other options of a strategy, after checking that they can be combined.

    Raises
    ------
    ConfigError
        With the reason, if two options cannot be combined.
    """
    name, parts = type(strategy).__name__, strategy.parts
    wanted: list[str] = [parts.lora] if parts.lora != "factors" else []
    wanted += ["submodels"] if parts.differ or (parts.named and not strategy.one_for_all) else []
    wanted += ["row_mask"] if parts.rows.mask else []
    wanted += ["missing"] if missing.by != "drop" else []
    for option in wanted:
        if option in strategy.refused:
            raise ConfigError(f"{option}: not with {name}: {strategy.refused[option]}")
    if parts.rows.mask:
        missing = missing.settled(lasting=False)
        if missing.remembers:
            raise ConfigError(f"missing: {missing.by!r}: not with row_mask: {RESTS}")
    if budget is not None and any(terms.quantizer for terms in parts.terms.values()):
        raise ConfigError("submodels: a budget sets the rate of all nodes. Leave out the quantizers of terms.")
    dense = {
        f"{name} sends each node other arrays": not strategy.one_for_all,
        "nodes with sub-models are sent other arrays": parts.differ,
        "with lora='fedsa' nodes are not sent all arrays": parts.lora == "fedsa",
        f"with lora={parts.lora!r} all factors are new in every round, so a change is no smaller": (
            parts.lora in PRODUCTS
        ),
    }
    for reason, holds in dense.items():
        if holds and downlink.codec is not None:
            raise ConfigError(f"downlink: {reason}. Set it to None.")
    return missing


def check_inside_clusters(density: float, skip: SkipRule | None, missing: Missing, lora: LoraMode) -> None:
    """Raise ConfigError, with the reason, if options of TAC's aggregation inside clusters cannot be combined."""
    if not 0 < density <= 1:
        raise ConfigError(f"density must be above 0 and at most 1, got {density}.")
    if density < 1 and lora in PRODUCTS:
        raise ConfigError(f"density: not with lora={lora!r}: no product can be made from some entries of factors.")
    if skip is None:
        return
    if len(skip.weights) > 1:
        raise ConfigError("skip: only a rule of one step, as AQUILA's is: a slot may change its cluster.")
    if density < 1:
        raise ConfigError("skip: not with a density: inactive entries would move by uploads of earlier rounds.")
    if lora in PRODUCTS:
        raise ConfigError(f"skip: not with lora={lora!r}: {REMEMBERS}")
    if missing.by not in ("drop", "mifa"):
        raise ConfigError(f"missing: {missing.by!r}: not with skip: a missing slot counts like one that skips.")
