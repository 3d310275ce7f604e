"""The client half of error feedback: what was lost by compression or on the network is sent later.

==========  ==============================================  ===============
paper       meaning                                         here
==========  ==============================================  ===============
e           residual: what was not sent yet                 `Residual`
p = g + e   what is to be sent                              `total`
C(p)        what is sent                                    the frame
==========  ==============================================  ===============

Deviations from the paper
-------------------------
See `fedkit.strategies.error_feedback`. ``e ← p − C(p)`` is applied only once the server says that C(p) arrived. If
C(p) was lost, ``e ← p``, unless something stands in for missing clients on the server, since C(p) would then count
twice.
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
        """Return True: even after a lost upload, the residual holds the update."""
        return True

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return a frame for the update plus the residual."""
        residual = Residual(job.state, self.scheme, like=update)
        residual.keeps = not job.instructions.options.get("stood-in", False)
        total = add(residual.settle(job.instructions.accepted), update)
        frame = job.instructions.codec.encode(job.travelling(total), rng=job.rng)
        residual.keep(total)
        residual.stage(frame, job.rows)
        return Coded(frame, residual.digest)
