"""The client half of error feedback: what coding lost, or the network, is sent later.

==========  ==============================================  ===============
paper       meaning                                         here
==========  ==============================================  ===============
e           what was not sent yet                           `Residual`
p = g + e   what is to be sent                              `total`
C(p)        what is sent                                    the frame
==========  ==============================================  ===============

Deviations from the paper
-------------------------
See `fedkit.strategies.error_feedback`. ``e ← p − C(p)`` waits until the server says that C(p) arrived; if it did
not, ``e ← p``; unless the server lets others stand in for missing clients, for then it would count twice.
"""

from __future__ import annotations

from typing import ClassVar

from fedkit.arrays import NamedArrays, add
from fedkit.memory import Residual
from fedkit.message import Instructions

from .base import Coded, Job, UpdateMod


class ErrorFeedbackMod(UpdateMod):
    """Turns the reply into a coded update. The server needs `fedkit.strategies.ErrorFeedback`."""

    scheme: ClassVar[str] = "error-feedback"

    def rewinds(self, instructions: Instructions) -> bool:
        """Return that they do: what is kept is what was not sent."""
        return True

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return the update, with what was not sent before, as a frame."""
        residual = Residual(job.state, self.scheme, like=update)
        residual.keeps = not job.instructions.options.get("stood-in", False)
        total = add(residual.settle(job.instructions.accepted), update)
        frame = job.instructions.codec.encode(job.travelling(total), rng=job.rng)
        residual.keep(total)
        residual.stage(frame, job.rows)
        return Coded(frame, residual.digest)
