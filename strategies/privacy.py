"""Flower's differential privacy and secure aggregation: what works with coded updates, and why the rest does not.

Write ``mods=[AquilaMod(), LocalDpMod(...)]``, with fedkit's mod first, so that it is the outer one. `LocalDpMod`
clips the app's update and adds noise, and everything that fedkit sends is computed from the result. Quantization,
masks, innovations, the residual of error feedback and skipping are then post-processing, which costs no privacy.
This holds under these conditions:

- Noise is added in *every* round in which the app trains, and every such round counts in the composition, even if
  its upload was skipped or lost: what it holds may be sent later, in the residual or in an innovation.
- The app itself keeps nothing between rounds that is sent later without passing the mod.
- Metrics are not private, as with Flower's own strategies: ``num-examples`` and losses are sent as the app reports
  them, and `LossLevels` and the weights use them.

As the outer mod, `LocalDpMod` would be given frames, to which noise cannot be added: it answers with an error.

Noise that the *server* adds is matched to how far one client can move the mean: ``clipping_norm / n`` if all n
clients have the same weight. That holds only for float32 uploads and their plain mean. A quantizer may make an
update longer than it was; error feedback sends what is left of several rounds at once; surrogates count the update
of one client twice; the clusters of TAC are means over few clients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NoReturn

from flwr.app import ConfigRecord

from fedkit.aggregation.mean import Mean
from fedkit.errors import ConfigError

if TYPE_CHECKING:
    from .asking import Asking

CLIPPING_NORM: Final = "clipping_norm"  # Flower's key: marks its wrappers with client-side clipping
LOCAL: Final = "Use LocalDpMod inside fedkit's mod instead."
FRAMES: Final = f"the wrapper would be given frames, and it must clip arrays. {LOCAL}"
LONGER: Final = f"the noise is calibrated for float32 uploads with equal weights: Plain(weighted=False). {LOCAL}"
SECURE: Final = (
    "its masks cancel only if all clients send integers on one grid, and each frame has its own grid. "
    "Flower 1.39 has SecAgg+ only for the older `flwr.server` strategies."
)


def check_wrapped(strategy: Asking, config: ConfigRecord) -> None:
    """Check that a strategy inside a wrapper, such as Flower's for differential privacy, can be wrapped so.

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
    """Return whether a client can move the mean by at most the norm of its update over the number of clients."""
    aggregator = getattr(strategy, "aggregator", None)
    plain = type(aggregator) is Mean and not aggregator.weighted and aggregator.step_size == 1.0
    coded = strategy.codec.quantizer or strategy.codec.sparsifier
    return plain and not coded and strategy.scheme == "aquila" and strategy.parts.trivial


def refuse_secure_aggregation(*_: Any, **__: Any) -> NoReturn:
    """Raise ConfigError; installed as the method that Flower's SecAgg+ calls first on older strategies."""
    raise ConfigError(f"secure aggregation: {SECURE}")
