"""Flower's differential privacy, and secure aggregation: what goes with coded updates, and why the rest does not.

``mods=[AquilaMod(), LocalDpMod(...)]``, fedkit's mod first, so that it is outside: `LocalDpMod` clips the app's
update and adds noise, and all that fedkit sends is made of the result. Quantizing, masks, innovations, error
feedback's residual and the choice to be silent then are post-processing: they cost no privacy, provided that

- noise is added in *every* round in which the app trains, and every such round is counted in the composition, also
  one whose upload was skipped or lost: what it holds may travel later, in the residual or in an innovation;
- the app itself keeps nothing between rounds that is sent later without passing the mod;
- metrics are not private, as with Flower's own strategies: ``num-examples`` and losses travel as the app reports
  them, and `LossLevels` and the weights make use of them.

Outside of fedkit's mod it would be given frames, which are no numbers to add noise to: it answers with an error.

Noise that the *server* adds is matched to how far one client can move the mean, ``clipping_norm / n`` if each of n
clients counts alike. That holds for float32 uploads and their plain mean alone. A quantizer may make an update
longer than it was; error feedback sends what is left of several rounds at once; surrogates count one client's
twice; TAC's clusters are means of few.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

from flwr.app import ConfigRecord

from fedkit.aggregation.mean import Mean
from fedkit.errors import ConfigError

if TYPE_CHECKING:
    from .asking import Asking

CLIPPING_NORM: Final = "clipping_norm"  # Flower's key, by which the wrappers for clipping by clients can be told
LOCAL: Final = "Use LocalDpMod inside fedkit's mod instead."
FRAMES: Final = f"what is around it would be given frames, and must clip arrays. {LOCAL}"
LONGER: Final = (
    f"the noise is matched to float32 uploads of which each counts alike: Plain(weighted=False). {LOCAL}"
)
SECURE: Final = (
    "its masks cancel where all clients send integers of one grid; each frame has a grid of its own. "
    "Flower 1.39 has SecAgg+ for the older `flwr.server` strategies alone."
)


def check_wrapped(strategy: Asking, config: ConfigRecord) -> None:
    """Check that a strategy that another one drives, as Flower's differential privacy does, can be driven so.

    Raises
    ------
    ConfigError
        With the reason.
    """
    if not strategy.wrapped:
        return
    if CLIPPING_NORM not in config:
        raise ConfigError(f"{type(strategy).__name__} is wrapped, and its `start` not called: {FRAMES}")
    if not bounded(strategy):
        raise ConfigError(f"{type(strategy).__name__} is wrapped: {LONGER}")


def bounded(strategy: Asking) -> bool:
    """Return whether no client can move the mean further than its update is long, over how many there are."""
    aggregator = getattr(strategy, "aggregator", None)
    plain = type(aggregator) is Mean and not aggregator.weighted and aggregator.step_size == 1.0
    coded = strategy.codec.quantizer or strategy.codec.sparsifier
    return plain and not coded and strategy.scheme == "aquila" and strategy.parts.trivial


def refuse_secure_aggregation(*_: Any, **__: Any) -> NoReturn:
    """Raise ConfigError: Flower's SecAgg+ begins by calling this method of the older strategies."""
    raise ConfigError(f"secure aggregation: {SECURE}")
