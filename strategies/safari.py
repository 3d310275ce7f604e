"""SAFARI: clients train and send sparse updates; who does not answer is replaced by its most similar client.

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
        Share of each matrix that a client keeps, above 0 to 1.
    masks : {"own", "drawn"}
        Whose entries are kept: those of a mask that each client has and moves, as published, which travels along;
        or others in each upload, drawn by both sides, so that only a seed travels. Of a fifth of the entries, the
        mask takes 0.72 bits for each of all.
    rewire : float
        Share of the kept entries that a client moves in a round, 0 to 1. At 0.5, the default, every entry soon
        has its turn, while those that matter most stay: worth 4 points on CIFAR-10 against 1, at which all that
        is sent in a round rests in the next (``benchmarks/README.md``).
    anneal : bool
        Whether to rewire less from round to round, by a cosine down to nothing in the last, as published.
    missing : {"safari", "mifa", "reweight", "drop"} or Missing
        What missing clients count with; `Missing` has the choices of SAFARI's family: similarity, surrogate,
        warm-up.
    sparse_model : bool
        Whether clients start from a sparse model, as published, or from the whole one, of which they update
        a sparse part.
    quantizer : Quantizer
        Of the values sent; None: float32.
    weighted : bool
        Whether clients count by their number of examples.
    **options
        As in `UpdateStrategy`.
    """

    scheme: ClassVar[str] = "safari"
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        PRODUCTS, "a client trains and sends single entries of factors, of which no product can be made."
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
        """Return SAFARI as far as it is known: sparse models, l2 similarity, no warm-up, unweighted."""
        return cls(
            rewire=0.05,
            anneal=True,
            sparse_model=True,
            weighted=False,
            **{"missing": Missing("safari", "l2", warmup_rounds=0), "downlink": None, **options},
        )

    def options(self, params: NamedArrays, part: Part) -> Mapping[str, Scalar]:
        """Return the density, and the share to rewire this round: ``rewire/2 (1 + cos(π t/T))`` if it anneals."""
        progress = self._cohort.server_round / self.num_rounds if self.anneal else 0.0
        return {
            "density": self.density,
            "rewire": self.rewire / 2 * (1 + math.cos(math.pi * progress)),
            "sparse-model": self.sparse_model,
            "drawn": self.masks == "drawn",
            "seed": self.seed,
        }
