"""Codecs as text, for the messages that tell a client how to encode."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Final

from fedkit.codec.baselines import Blocks, Qsgd, Sign
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.codec.rotation import Eden
from fedkit.codec.sparsify import Magnitude, Nonzero, Structured, TopK
from fedkit.codec.wire import Codec
from fedkit.errors import ConfigError

QUANTIZERS: Final = {
    "aquila-mid-tread": AquilaMidTread,
    "blocks": Blocks,
    "eden": Eden,
    "entropy-constrained": EntropyConstrained,
    "qsgd": Qsgd,
    "sign": Sign,
    "zero-mid-tread": ZeroMidTread,
}
SPARSIFIERS: Final = {"magnitude": Magnitude, "nonzero": Nonzero, "structured": Structured, "top-k": TopK}


def to_text(codec: Codec) -> str:
    """Return a codec as JSON.

    Raises
    ------
    ConfigError
        If a stage is not one of fedkit's, since nodes would not know it.
    """
    stages = {"quantizer": (codec.quantizer, QUANTIZERS), "sparsifier": (codec.sparsifier, SPARSIFIERS)}
    text = {}
    for stage, (chosen, known) in stages.items():
        if chosen is None:
            continue
        names = [name for name, cls in known.items() if cls is type(chosen)]
        if not names:
            raise ConfigError(f"expected one of fedkit's {stage}s, got {chosen!r}: nodes would not know it.")
        fields: Any = chosen
        text[stage] = {names[0]: asdict(fields)}
    return json.dumps(text)


def from_text(text: str) -> Codec:
    """Return a codec; inverse of `to_text`; raises ConfigError."""
    try:
        stages: dict[str, dict[str, dict[str, Any]]] = json.loads(text)
        made = {}
        for stage, known in (("quantizer", QUANTIZERS), ("sparsifier", SPARSIFIERS)):
            made[stage] = [known[name](**fields) for name, fields in stages.pop(stage, {}).items()]
        if stages:
            raise KeyError(*stages)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"the codec cannot be read: {text!r} ({error}).") from None
    return Codec(*(stage[0] if stage else None for stage in made.values()))
