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

from .base import Coded, Job, UpdateMod


class AquilaMod(UpdateMod):
    """Turns the reply into a quantized innovation, or a skip. The server needs `fedkit.strategies.Aquila`."""

    scheme: ClassVar[str] = "aquila"

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return the innovation as a frame, or a skip if it is too small to be worth it."""
        memory = ClientMemory(job.state, self.scheme, like=update)
        innovation = subtract(update, memory.settle(job.instructions.accepted))
        if squared_norm(innovation) == 0:
            return Coded(None, memory.digest)
        frame = job.instructions.codec.encode(innovation, rng=job.rng)
        coded = decode(frame, like=update)
        size = squared_norm(coded) + squared_norm(subtract(innovation, coded))
        if size <= float(job.instructions.options["skip-threshold"]) and memory.digest != GENESIS:
            return Coded(None, memory.digest)
        memory.stage(frame)
        return Coded(frame, memory.digest)
