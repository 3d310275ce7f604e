"""AdaQuantFL's rule: the quantizer gets more levels as the loss falls.

D. Jhunjhunwala, A. Gadhikar, G. Joshi and Y. Eldar, "Adaptive Quantization of Model Updates for
Communication-Efficient Federated Learning", ICASSP 2021, https://arxiv.org/abs/2102.04487.

==========  =============================  ==============================
paper       meaning                        here
==========  =============================  ==============================
s_0, s_k    levels per sign                `start`; s_k in `bits`
F(θ_k)      training loss in round k       the clients' metric `metric`
==========  =============================  ==============================

Deviations from the paper
-------------------------
The number of levels in a round follows from the loss of the round before, which is reported with its uploads. A
grid of fedkit has ``2^b − 1`` levels: b bits hold the sign and at least s_k levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fedkit.codec.baselines import Qsgd
from fedkit.codec.protocol import MAX_BITS
from fedkit.codec.wire import Codec
from fedkit.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LossLevels:
    """``s_k = ⌈s_0 √(F(θ_0) / F(θ_k))⌉`` levels per sign."""

    start: float = 2.0
    metric: str = "train-loss"

    def __post_init__(self) -> None:
        if not self.start >= 1:
            raise ConfigError(f"start: expected at least 1 level, got {self.start}.")

    def bits(self, first: float, now: float) -> int:
        """Return the number of bits for the levels and a sign, given the first and the present loss.

        >>> LossLevels(2).bits(2.3, 2.3), LossLevels(2).bits(2.3, 0.023)
        (3, 6)
        """
        if not (math.isfinite(first) and math.isfinite(now) and first > 0):
            return self.bits(1.0, 1.0)
        levels = math.ceil(self.start * math.sqrt(first / max(now, 1e-12)))
        return min(1 + math.ceil(math.log2(levels + 1)), MAX_BITS)

    def codec(self, codec: Codec, first: float, now: float) -> Codec:
        """Return the codec with that number of bits; raises ConfigError if its quantizer is not `Qsgd`."""
        bits, quantizer = self.bits(first, now), codec.quantizer
        if not isinstance(quantizer, Qsgd):
            raise ConfigError(f"levels: expected the quantizer Qsgd, got {quantizer!r}.")
        return replace(codec, quantizer=Qsgd(bits))
