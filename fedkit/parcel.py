"""Parcels: the frames that bring a node to the server's arrays, as the one Array of a message."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Final

import numpy as np
from flwr.app import ConfigRecord, RecordDict

from fedkit.errors import WireFormatError
from fedkit.message import config_of, frame_record, read_frame

PARCEL: Final = "fedkit-parcel"
_HASH: Final = 16  # bytes of a version, and of the digest of a memory
_PARCEL: Final = struct.Struct(
    f"<{_HASH}s{_HASH}s8s"
)  # base, version, digest; then the sizes of all frames but one


@dataclass(frozen=True, slots=True)
class Parcel:
    """The frames that bring one node to the server's arrays; see `fedkit.broadcast`."""

    base: bytes  # the version that the first frame adds to; GENESIS: it is a snapshot
    version: bytes  # the version that the node then holds; GENESIS: it need not remember it
    digest: bytes  # of the arrays of that version
    frames: tuple[bytes, ...]


def write_parcel(content: RecordDict, key: str, config: ConfigRecord, parcel: Parcel) -> None:
    """Write a parcel as the one Array of the ArrayRecord `key`, and its description into the config."""
    content[key] = frame_record(b"".join(parcel.frames))
    sizes = [len(frame) for frame in parcel.frames[:-1]]
    config[PARCEL] = _PARCEL.pack(parcel.base, parcel.version, parcel.digest) + np.array(sizes, "<u4").tobytes()


def read_parcel(content: RecordDict) -> Parcel:
    """Return the parcel of a message; inverse of `write_parcel`.

    Raises
    ------
    WireFormatError
        If there is none, or its sizes do not add up.
    """
    data, packed = read_frame(content), (config_of(content) or ConfigRecord()).get(PARCEL)
    if not isinstance(packed, bytes) or len(packed) < _PARCEL.size or (len(packed) - _PARCEL.size) % 4:
        raise WireFormatError("the message does not say what its frames are.")
    base, version, digest = _PARCEL.unpack_from(packed)
    sizes = np.frombuffer(packed, "<u4", offset=_PARCEL.size).tolist()
    if sizes and not 0 < min(sizes) <= sum(sizes) < len(data):
        raise WireFormatError(f"the frames take {len(data)} bytes: expected more than {sum(sizes)}.")
    ends = [0, *accumulate(sizes), len(data)] if data else [0]
    return Parcel(base, version, digest, tuple(data[start:end] for start, end in pairwise(ends)))
