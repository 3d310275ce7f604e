"""The client half of AQUILA: quantized innovation, and the rule when not to send it.

====================  ==================================  ==========================
paper                 meaning                             here
====================  ==================================  ==========================
v                     innovation, ∇f_m(θ^k) − q_m         `innovation`
Δq                    quantized innovation                `coded`
ε                     quantization error, v − Δq          `innovation` − `coded`
β/α² ‖θ^k − θ^{k−1}‖²  how much silence is allowed         option ``skip-threshold``
====================  ==================================  ==========================

The device skips iff ``‖Δq‖² + ‖ε‖² ≤ (β/α²) ‖θ^k − θ^{k−1}‖²``.

Deviations from the paper
-------------------------
The gradient is the update of local training, local − received, so α is 1 here. The server sends the threshold,
so a device needs no former model and one that missed rounds uses the right one. A client that the server has
nothing from never skips (the paper's first-round rule, for late joiners too).
"""

from __future__ import annotations

from typing import ClassVar

from fedkit.arrays import NamedArrays, squared_norm, subtract
from fedkit.codec.wire import decode
from fedkit.memory import GENESIS, ClientMemory
from fedkit.message import Instructions

from .base import UpdateMod


class AquilaMod(UpdateMod):
    """Turns the reply into a quantized innovation, or a skip. The server needs `fedkit.strategies.Aquila`."""

    scheme: ClassVar[str] = "aquila"

    def upload(self, update: NamedArrays, instructions: Instructions, memory: ClientMemory) -> bytes | None:
        """Return the innovation as a frame, None if it is too small to be worth it."""
        innovation = subtract(update, memory.arrays)
        if squared_norm(innovation) == 0:
            return None
        frame = instructions.codec.encode(innovation)
        coded = decode(frame, like=update)
        size = squared_norm(coded) + squared_norm(subtract(innovation, coded))
        too_small = size <= float(instructions.options.get("skip-threshold", 0.0))
        return None if too_small and memory.digest != GENESIS else frame
