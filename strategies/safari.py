"""SAFARI: clients send sparse updates; the most similar client stands in for one that does not answer.

Symbols, source and deviations: `fedkit.aggregation.compensate` (the server's rules),
`fedkit.aggregation.missing` (the choices) and `fedkit.clients.safari` (the masks).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Final, Literal, Self

from fedkit.aggregation.mean import MaskedMean
from fedkit.aggregation.missing import Choice, Missing
from fedkit.arrays import NamedArrays
from fedkit.codec.protocol import Quantizer
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError

from .asking import Part
from .base import UpdateStrategy
from .parts import PRODUCTS

REWIRE: Final = 0.5


class Safari(UpdateStrategy[Any]):
    """Sparse updates, and surrogates for missing ones. Clients need `fedkit.clients.SafariMod`.

    Parameters
    ----------
    density : float
        Share of the entries of each matrix that a client's mask keeps, above 0 to 1; only these are sent.
    masks : {"own", "drawn"}
        "own", as published: each client has a mask, moves it from round to round and sends it with every upload.
        "drawn": both sides draw a new mask for each upload, so that only a seed is sent. A mask that keeps a fifth
        of the entries takes 0.72 bits for each of all entries.
    rewire : float
        Share of the kept entries that a client replaces by others in a round, 0 to 1. At 0.5, the default, every
        entry soon has its turn, while those that matter most stay. That is worth 4 points on CIFAR-10 against 1,
        at which all that is sent in one round is left out in the next (``benchmarks/README.md``).
    anneal : bool
        Whether to rewire less from round to round, as published: by a cosine that reaches 0 in the last round.
    missing : {"safari", "mifa", "reweight", "drop"} or Missing
        How missing clients count. A `Missing` also sets the options of "safari": similarity, surrogate, warm-up.
    sparse_model : bool
        True, as published: clients start from a sparse model. False: they start from the whole model and update
        a sparse part of it.
    quantizer : Quantizer
        Of the values sent; None: float32.
    weighted : bool
        Whether clients are weighted by their number of examples.
    **options
        As in `UpdateStrategy`.
    """

    scheme: ClassVar[str] = "safari"
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        PRODUCTS, "a client sends some entries of its factors, from which no product can be made."
    )

    def __init__(
        self,
        *,
        density: float = 0.2,
        masks: Literal["own", "drawn"] = "own",
        rewire: float = REWIRE,
        anneal: bool = False,
        missing: Choice | Missing = "safari",
        sparse_model: bool = False,
        quantizer: Quantizer | None = None,
        weighted: bool = True,
        **options: Any,
    ) -> None:
        if not 0 < density <= 1:
            raise ConfigError(f"density must be above 0 and at most 1, got {density}.")
        if not 0 <= rewire <= 1:
            raise ConfigError(f"rewire must be 0 to 1, got {rewire}.")
        super().__init__(MaskedMean(weighted, sparse_model), Codec(quantizer), missing=missing, **options)
        if sparse_model and not self.parts.trivial:
            raise ConfigError(
                "sparse_model: a model's entries that rest, or are not held, would count as pruned. Leave it."
            )
        if masks not in ("own", "drawn"):
            raise ConfigError(f"masks: expected 'own' or 'drawn', got {masks!r}.")
        if masks == "drawn" and (sparse_model or anneal or rewire != REWIRE):
            raise ConfigError(
                "masks='drawn': nobody keeps a mask, so that rewire, anneal and sparse_model mean nothing."
            )
        self.density, self.rewire, self.anneal, self.sparse_model = density, rewire, anneal, sparse_model
        self.masks = masks

    @classmethod
    def published(cls, **options: Any) -> Self:
        """Return SAFARI as published, as far as known: sparse models, l2 similarity, no warm-up, unweighted."""
        return cls(
            rewire=0.05,
            anneal=True,
            sparse_model=True,
            weighted=False,
            **{"missing": Missing("safari", "l2", warmup_rounds=0), "downlink": None, **options},
        )

    def options(self, params: NamedArrays, part: Part) -> Mapping[str, Scalar]:
        """Return the density and the share to rewire in this round: ``rewire/2 (1 + cos(π t/T))`` if annealed."""
        progress = self._cohort.server_round / self.num_rounds if self.anneal else 0.0
        return {
            "density": self.density,
            "rewire": self.rewire / 2 * (1 + math.cos(math.pi * progress)),
            "sparse-model": self.sparse_model,
            "drawn": self.masks == "drawn",
            "seed": self.seed,
        }
