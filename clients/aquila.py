"""The client half of AQUILA and of its baselines: what is sent for an update, and when it is skipped.

====================  ==================================  ==========================
paper                 meaning                             here
====================  ==================================  ==========================
∇f_m(θ^k)             gradient, times −1                  `update`
v                     innovation, ∇f_m(θ^k) − q_m         `innovation`
Δq                    quantized innovation                `coded`
ε                     quantization error, v − Δq          `error`: ‖ε‖²
====================  ==================================  ==========================

The skip rule is in `fedkit.skipping`. The option ``reference`` says what an update is compared with:

============  ==================================================================================
"accepted"    what the server already has from this client: AQUILA, LAQ; the default
"nothing"     the update itself is sent: QSGD, AdaQuantFL
"previous"    this client's update of the round before: MARINA, see `fedkit.aggregation.differences`
============  ==================================================================================

Deviations from the paper
-------------------------
The gradient is the update of local training, local − received, divided by the option ``step-size``; after one step
of SGD this is exactly the paper's gradient, times −1. A client from which the server has nothing never skips: the
paper's rule for the first round, applied to late joiners, too.
"""

from __future__ import annotations

import struct
from collections.abc import MutableMapping
from typing import ClassVar, Final

import numpy as np

from fedkit.arrays import NamedArrays, squared_norm, subtract
from fedkit.codec.wire import Codec, decode
from fedkit.memory import GENESIS, ClientMemory, chain
from fedkit.message import STEP_SIZE, Instructions
from fedkit.skipping import THRESHOLD, SkipRule

from .base import Coded, Job, UpdateMod


class AquilaMod(UpdateMod):
    """Turns the reply into a quantized innovation, or a skip. The server needs `fedkit.strategies.Aquila`."""

    scheme: ClassVar[str] = "aquila"

    def rewinds(self, instructions: Instructions) -> bool:
        """Return whether a lost upload changes the scheme's state; not AQUILA's own, which is staged."""
        return (
            instructions.options.get("reference") == "previous"
            or SkipRule.from_options(instructions.options).remembers
        )

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return a frame for the update, or a skip if the update is not worth sending."""
        step_size = np.float32(job.instructions.options.get(STEP_SIZE, 1.0))
        if step_size != 1:
            update = {name: array / step_size for name, array in update.items()}
        match job.instructions.options.get("reference"):
            case "nothing":
                return Coded(job.instructions.codec.encode(job.travelling(update), rng=job.rng))
            case "previous":
                return self._difference(update, job)
        return self._innovation(update, job)

    def _innovation(self, update: NamedArrays, job: Job) -> Coded:
        """Return the quantized innovation as a frame, or a skip."""
        memory = ClientMemory(job.state, self.scheme, like=update)
        innovation = subtract(update, memory.settle(job.instructions.accepted))
        if squared_norm(innovation) == 0 and memory.digest != GENESIS:
            return Coded(None, memory.digest)
        frame = job.instructions.codec.encode(innovation, rng=job.rng)
        coded = decode(frame, like=update)
        error = squared_norm(subtract(innovation, coded))
        rule = SkipRule.from_options(job.instructions.options)
        past = Past(job.state, memory.digest) if rule.remembers else None
        threshold, (last_error, silent) = (
            float(job.instructions.options[THRESHOLD]),
            past.now if past else (0.0, 0),
        )
        if memory.digest != GENESIS and rule.skips(squared_norm(coded), error, last_error, silent, threshold):
            if past:
                past.keep_silent()
            return Coded(None, memory.digest)
        memory.stage(frame)
        if past:
            past.upload(chain(memory.digest, frame), error)
        return Coded(frame, memory.digest)

    def _difference(self, update: NamedArrays, job: Job) -> Coded:
        """Return the update's difference from that of the round before, or the whole update if the server says so.

        If there is no update of the round before, or it did not arrive, the client skips.
        """
        previous, history = f"{self.scheme}.previous", f"{self.scheme}.history"
        accepted, base, change = job.instructions.accepted, GENESIS, update
        known = job.state.get(history) == accepted != GENESIS
        before = job.state.get(previous)
        job.state[previous] = Codec().encode(update)
        if not job.instructions.options.get("whole", False):
            if not known or before is None:
                job.state.pop(history, None)
                return Coded(None)
            base, change = accepted, subtract(update, decode(before, like=update))
        frame = job.instructions.codec.encode(change, rng=job.rng)
        job.state[history] = chain(base, frame)
        return Coded(frame, base)


class Past:
    """What LAQ's rule needs of the past: the error of the last upload that arrived, and the skips since."""

    _NAME: Final = "aquila.past"
    _VALUES: Final = struct.Struct("<16sddI")  # history with the last upload, its error, the error before, skips

    def __init__(self, state: MutableMapping[str, bytes], digest: bytes) -> None:
        self._state = state
        try:
            self._history, self._error, self._before, self.silent = self._VALUES.unpack(state[self._NAME])
        except (KeyError, struct.error):
            self._history, self._error, self._before, self.silent = GENESIS, 0.0, 0.0, 0
        if self._history != digest:  # the last upload was lost
            self._history, self._error = digest, self._before

    @property
    def now(self) -> tuple[float, int]:
        """Return ‖ε'‖² and the number of skips since the last upload."""
        return self._error, self.silent

    def keep_silent(self) -> None:
        """Record a skip."""
        self._save(self._history, self._error, self._before, self.silent + 1)

    def upload(self, history: bytes, error: float) -> None:
        """Record an upload and the digest that the history has if the upload arrives."""
        self._save(history, error, self._error, 0)

    def _save(self, *values: object) -> None:
        self._state[self._NAME] = self._VALUES.pack(*values)
