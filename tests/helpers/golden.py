"""What the golden frames were made of, and how they are read.

Each brings its shapes, the bytes of its values, and the mask that it is a change of.
"""

import json
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import numpy as np

from fedkit.codec.baselines import Blocks, Sign
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.packing import pack_mask, unpack_mask
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.codec.rotation import Eden
from fedkit.codec.snapshot import decode_snapshot, encode_snapshot
from fedkit.codec.sparsify import DrawnMask, Structured
from fedkit.codec.wire import Codec, decode

FILE = Path(__file__).parents[1] / "fixtures" / "wire" / "v1" / "frames.json"

SMALL = {
    "lora_A": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "lora_B": np.array([[0.5, -0.25], [0, 2]], np.float32),
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}


def drawn(shape, power, seed):
    """Return numbers in −1 to 1, the smaller the more for odd powers above 1; the same with every numpy."""
    raw = (np.arange(1, 1 + int(np.prod(shape)), dtype=np.uint64) + np.uint64(1000 * seed)) * np.uint64(2654435761)
    numbers = (raw % 2**32).astype(np.float64) / 2**31 - 1
    result = numbers
    for _ in range(power - 1):
        result = result * numbers
    return result.astype(np.float32).reshape(shape)


WIDE = {
    "lora_A": drawn((6, 60), 5, 0),
    "lora_B": drawn((60, 4), 5, 1) / 16,
    "bias": drawn((9,), 1, 2),
    "scalar": np.array(-0.75, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
EVEN = {name: np.sign(array) * (1 + array / 10) for name, array in WIDE.items()}  # almost equal in size


def every(step, update):
    return {name: np.arange(a.size).reshape(a.shape) % step == 0 for name, a in update.items()}


class Case(NamedTuple):
    """One golden frame's origin."""

    codec: Codec
    update: dict = SMALL
    mask: dict | DrawnMask | None = None
    last_mask: dict | None = None
    exact: bool = True  # made alike on every machine, by an encoder that is not tuned any more

    deflate: bool = False  # which encoders choose for a million levels and more

    def encode(self):
        rng = np.random.default_rng(0)
        if self.deflate:
            with patch.multiple("fedkit.codec.entropy", MANY=0, _WORSE=100):
                return self.codec.encode(self.update, mask=self.mask, rng=rng)
        return self.codec.encode(self.update, mask=self.mask, last_mask=self.last_mask, rng=rng)


CASES = {
    "float32-dense": Case(Codec()),
    "float32-masked": Case(Codec(), mask=every(3, SMALL)),
    "aquila-dense": Case(Codec(AquilaMidTread())),
    "aquila-masked": Case(Codec(AquilaMidTread()), mask=every(3, SMALL)),
    "zero-dense": Case(Codec(ZeroMidTread())),
    "zero-masked": Case(Codec(ZeroMidTread()), mask=every(3, SMALL)),
    "sign": Case(Codec(Sign()), WIDE),
    "zero-coded": Case(Codec(ZeroMidTread(6, 6)), WIDE),
    "zero-coded-shifted": Case(Codec(ZeroMidTread(14, 14)), WIDE | {"lora_A": drawn((20, 60), 9, 0)}),
    "designed-packed": Case(Codec(EntropyConstrained(4)), SMALL | {"more": drawn((40,), 1, 3)}, exact=False),
    "designed-coded": Case(Codec(EntropyConstrained(2)), WIDE, exact=False),
    "signs-of-blocks": Case(Codec(EntropyConstrained(0.9)), EVEN, exact=False),
    "rotated-packed": Case(Codec(Eden(2)), WIDE, exact=False),
    "rotated-long": Case(Codec(Eden(1)), {"w": drawn((4101,), 1, 4)}, exact=False),
    "blocks-packed": Case(Codec(Blocks(4, 16)), {"w": drawn((5, 7), 1, 5)}),
    "blocks-coded": Case(Codec(Blocks(4, 128)), WIDE),
    "zero-deflated": Case(Codec(ZeroMidTread(6, 6)), WIDE, exact=False, deflate=True),
    "mask-coded": Case(Codec(ZeroMidTread()), WIDE, every(40, WIDE)),
    "mask-delta": Case(
        Codec(ZeroMidTread()), WIDE, every(3, WIDE), every(3, WIDE) | {"lora_B": every(2, WIDE)["lora_B"]}
    ),
    "mask-drawn": Case(Codec(ZeroMidTread()), WIDE, DrawnMask(2**64 - 1, 0.1)),
    "structured": Case(Codec(ZeroMidTread(4, 4), Structured(0.25)), WIDE),
}


def entry(frame, decoded, last_mask=None):
    """Return what the file holds of a frame."""
    made = {
        "frame": frame.hex(),
        "shapes": {name: list(array.shape) for name, array in decoded.items()},
        "decoded": {name: array.astype("<f4").tobytes().hex() for name, array in decoded.items()},
    }
    if last_mask is not None:
        made["last_mask"] = {name: pack_mask(part.ravel()).hex() for name, part in last_mask.items()}
    return made


def load():
    """Return frame, keyword arguments of `decode` and values of every golden frame, by name."""
    loaded = {}
    for name, case in json.loads(FILE.read_text()).items():
        like = {key: np.zeros(shape, np.float32) for key, shape in case["shapes"].items()}
        last = case.get("last_mask")
        last = last and {
            key: unpack_mask(bytes.fromhex(part), like[key].size).reshape(like[key].shape)
            for key, part in last.items()
        }
        values = {key: np.frombuffer(bytes.fromhex(part), "<f4").tolist() for key, part in case["decoded"].items()}
        loaded[name] = bytes.fromhex(case["frame"]), {"like": like, "last_mask": last}, values
    return loaded


def read(name, data, known):
    """Return the arrays of a frame that was golden once."""
    return decode_snapshot(data) if name.startswith("snapshot") else decode(data, **known)


SNAPSHOTS = {
    "snapshot": lambda: encode_snapshot(SMALL),
    "snapshot-coded": lambda: encode_snapshot(WIDE, Codec(ZeroMidTread(6, 6))),
}
