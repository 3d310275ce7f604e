"""Settings for one kind of node: its part of the model, its bits, its run config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fedkit.arrays import NamedArrays
from fedkit.codec.protocol import Quantizer
from fedkit.config import Scalar
from fedkit.submodels import Cut, SubModel, whole


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Settings for the nodes of one sub-model name or device profile: their part, bits and run config.

    Pass them in `submodels`, under that name, if such nodes need other settings than the rest:

    ``Terms(cut=lora_rank(4), quantizer=ZeroMidTread(2, 2), config={"r": 4, "lora-alpha": 8, "batch-size": 4})``

    Parameters
    ----------
    cut : Cut
        Which part of the model these nodes hold.
    quantizer : Quantizer, optional
        Of their uploads; unset: the strategy's.
    config : mapping of str to Scalar
        Keys of the run config that have other values on these nodes (`fedkit.message.run_config_of`).
    """

    cut: Cut = whole
    quantizer: Quantizer | None = None
    config: Mapping[str, Scalar] = field(default_factory=dict)

    def __call__(self, params: NamedArrays) -> SubModel:
        """Return the part of the model, so that terms can be used as a `Cut`."""
        return self.cut(params)
