"""Update ⇄ bytes, in stages: sparsify → quantize → entropy-code → frame."""

from .baselines import Blocks, Qsgd, Sign
from .entropy_constrained import EntropyConstrained
from .quantize import AquilaMidTread, ZeroMidTread
from .rotation import Eden
from .sparsify import Magnitude, Nonzero, Structured, TopK
from .wire import Codec, decode

__all__ = [
    "AquilaMidTread",
    "Blocks",
    "Codec",
    "Eden",
    "EntropyConstrained",
    "Magnitude",
    "Nonzero",
    "Qsgd",
    "Sign",
    "Structured",
    "TopK",
    "ZeroMidTread",
    "decode",
]
