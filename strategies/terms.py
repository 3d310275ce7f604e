"""What the server decides for the nodes of one kind: their part of the model, their bits, their run config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedkit.arrays import NamedArrays
from fedkit.codec.protocol import Quantizer
from fedkit.config import Scalar
from fedkit.submodels import Cut, SubModel, whole


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What nodes of one name do otherwise than the rest; the name is that of their sub-model, or of their profile.

    ``Terms(cut=lora_rank(4), quantizer=ZeroMidTread(2, 2), config={"r": 4, "lora-alpha": 8, "batch-size": 4})``

    Parameters
    ----------
    cut : Cut
        Which part of the model they hold.
    quantizer : Quantizer, optional
        Of their uploads; unset: the strategy's.
    config : mapping of str to Scalar
        Keys of the run config that have other values there (`fedkit.message.run_config_of`).
    """

    cut: Cut = whole
    quantizer: Quantizer | None = None
    config: Mapping[str, Scalar] = field(default_factory=dict)

    def __call__(self, params: NamedArrays) -> SubModel:
        """Return the part, so that terms are a `Cut`, too."""
        return self.cut(params)
