"""Error feedback: FedAvg over coded updates; what compression loses is kept on the client and sent later.

S. P. Karimireddy, Q. Rebjock, S. Stich and M. Jaggi, "Error Feedback Fixes SignSGD and other Gradient Compression
Schemes", ICML 2019, https://arxiv.org/abs/1901.09847, algorithm 2.

Deviations from the paper
-------------------------
The gradient is the update of local training, local − received, and the mean is weighted by the number of examples
unless `weighted` is False. A client that does not take part keeps its residual, which is what it has not sent yet.
A client whose upload was lost sends it later, unless `missing` lets something else count for missing clients: then
the lost upload is given up.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Final

from fedkit.aggregation.mean import Mean
from fedkit.arrays import NamedArrays
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.protocol import Quantizer
from fedkit.codec.sparsify import Sparsifier
from fedkit.codec.wire import Codec
from fedkit.config import Scalar

from .asking import Part
from .base import UpdateStrategy

HALF_A_BIT: Final = EntropyConstrained(0.5)  # per parameter


class ErrorFeedback(UpdateStrategy[Any]):
    """Any codec, with error feedback: what it loses is sent later. Clients need `fedkit.clients.ErrorFeedbackMod`.

    Parameters
    ----------
    quantizer : Quantizer, optional
        Half a bit per parameter if unset; None: float32, for use with a sparsifier alone.
    sparsifier : Sparsifier, optional
        Chooses the entries that are sent.
    weighted : bool
        Whether clients are weighted by their number of examples.
    gap : bool
        Whether to report how far the product of the averaged LoRA factors is from the mean of the products, as the
        metric ``lora-gap`` (`fedkit.aggregation.lora`).
    **options
        As in `UpdateStrategy`, but the downlink takes 1 bit per parameter if unset.
    """

    scheme: ClassVar[str] = "error-feedback"

    def __init__(
        self,
        *,
        quantizer: Quantizer | None = HALF_A_BIT,
        sparsifier: Sparsifier | None = None,
        weighted: bool = True,
        gap: bool = False,
        **options: Any,
    ) -> None:
        codec = Codec(quantizer, sparsifier)
        options.setdefault("downlink", Codec(EntropyConstrained(1.0)))
        super().__init__(Mean(weighted, gap=gap), codec, **options)

    def options(self, params: NamedArrays, part: Part) -> Mapping[str, Scalar]:
        """Return whether a lost upload is given up because something stands in for it, or else sent later."""
        return {"stood-in": True} if self.missing.by != "drop" else {}
