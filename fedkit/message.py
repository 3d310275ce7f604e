"""Every Flower record that fedkit writes or reads, and its keys.

A *train* or *evaluate* message holds one `Array` of stype ``fedkit/1``, whose data is a parcel of one frame or
more, and fedkit's instructions among the app's own config. A reply holds one frame, or none if the client chose to
skip or only evaluated, and a ConfigRecord ``fedkit`` with the report. On the way, the app's metrics are in the
report, too: one record less is one call less, of 0.8 kB besides what it says (`fedkit.ledger`).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Final, TypeVar, cast

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays
from fedkit.codec.names import from_text, to_text
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError, ReplyError, WireFormatError

R = TypeVar("R", ArrayRecord, MetricRecord, ConfigRecord)

STYPE: Final = "fedkit/1"
FRAME: Final = "frame"  # the name of the one Array of a message
FEDKIT: Final = "fedkit"  # the ConfigRecord of a reply

SERVER_ROUND: Final = "server-round"
SCHEME: Final = "fedkit-scheme"
CODEC: Final = "fedkit-codec"
ACCEPTED: Final = "fedkit-accepted"
PARCEL: Final = "fedkit-parcel"
OPTION_PREFIX: Final = "fedkit-option-"

CLIENT_ID: Final = "client-id"
BASE: Final = "base"
VERSION: Final = "version"

_HASH: Final = 16  # bytes of a version, and of the digest of a memory
_PARCEL: Final = struct.Struct(
    f"<{_HASH}s{_HASH}s8s"
)  # base, version, digest; then the sizes of all frames but one


@dataclass(frozen=True, slots=True)
class Instructions:
    """What the server tells one node for one round."""

    scheme: str  # which mod is meant
    server_round: int
    codec: Codec  # how to code the upload
    accepted: bytes  # digest of the uploads that the server has accepted from this client
    options: Mapping[str, Scalar] = field(default_factory=dict)  # what this scheme alone needs


@dataclass(frozen=True, slots=True)
class Parcel:
    """The frames that bring one node to the server's arrays; see `fedkit.broadcast`."""

    base: bytes  # the version that the first frame adds to; no version: it is a snapshot
    version: bytes  # that the node then holds; none: it need not remember it
    digest: bytes  # of its arrays
    frames: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Report:
    """What a client says about its upload."""

    client_id: str  # stable name of the client, not Flower's random node id
    base: bytes  # digest of the memory that the upload adds to
    skipped: bool  # asked, answered, chose to send nothing
    version: bytes  # of the arrays that the client holds
    options: Mapping[str, Scalar] = field(default_factory=dict)  # what this scheme alone needs


def to_arrays(record: ArrayRecord) -> dict[str, NDArray[np.float32]]:
    """Return an ordinary ArrayRecord as float32 arrays."""
    return {name: np.asarray(array.numpy(), np.float32) for name, array in record.items()}


def from_arrays(arrays: NamedArrays) -> ArrayRecord:
    """Return arrays as an ordinary ArrayRecord; inverse of `to_arrays`."""
    return ArrayRecord({name: Array(np.asarray(array, np.float32)) for name, array in arrays.items()})


def write_parcel(content: RecordDict, key: str, config: ConfigRecord, parcel: Parcel) -> None:
    """Write a parcel as the one Array of the ArrayRecord `key`, and what it is among the config."""
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
    data, packed = read_frame(content), (_config_of(content) or ConfigRecord()).get(PARCEL)
    if not isinstance(packed, bytes) or len(packed) < _PARCEL.size or (len(packed) - _PARCEL.size) % 4:
        raise WireFormatError("the message does not say what its frames are.")
    base, version, digest = _PARCEL.unpack_from(packed)
    sizes = np.frombuffer(packed, "<u4", offset=_PARCEL.size).tolist()
    if sizes and not 0 < min(sizes) <= sum(sizes) < len(data):
        raise WireFormatError(f"the frames take {len(data)} bytes: expected more than {sum(sizes)}.")
    ends = [0, *accumulate(sizes), len(data)] if data else [0]
    return Parcel(base, version, digest, tuple(data[start:end] for start, end in pairwise(ends)))


def frame_record(frame: bytes) -> ArrayRecord:
    """Return a frame as the one Array of an ArrayRecord."""
    return ArrayRecord({FRAME: Array("uint8", (len(frame),), STYPE, frame)})


def read_frame(content: RecordDict) -> bytes:
    """Return the frame in a message's content; inverse of `frame_record`.

    Raises
    ------
    WireFormatError
        If there is not exactly one ArrayRecord, with exactly one Array, of stype ``fedkit/1``.
    """
    arrays = [array for record in records_of(content, ArrayRecord) for array in record.values()]
    if len(arrays) != 1 or arrays[0].stype != STYPE:
        raise WireFormatError(f"expected one Array of stype {STYPE!r}, got {[a.stype for a in arrays][:3]}.")
    return arrays[0].data


def write_instructions(config: ConfigRecord, instructions: Instructions) -> None:
    """Write the instructions among the app's own config."""
    config[SERVER_ROUND] = instructions.server_round
    config[SCHEME] = instructions.scheme
    config[CODEC] = to_text(instructions.codec)
    config[ACCEPTED] = instructions.accepted
    _write_options(config, instructions.options)


def read_scheme(message: Message) -> str | None:
    """Return the scheme a message was made by; None for an ordinary Flower message."""
    config = _config_of(message.content)
    return None if config is None else str(config[SCHEME])


def read_instructions(message: Message) -> Instructions:
    """Return the instructions of a message; inverse of `write_instructions`.

    Raises
    ------
    ConfigError
        If the message has none, or they are incomplete.
    """
    config = _config_of(message.content)
    if config is None:
        raise ConfigError(f"the message has no {SCHEME!r} in its config.")
    server_round, accepted = config.get(SERVER_ROUND), config.get(ACCEPTED)
    if not isinstance(server_round, int) or not isinstance(accepted, bytes):
        raise ConfigError(f"the message's {SERVER_ROUND!r} or {ACCEPTED!r} is missing or of a wrong type.")
    codec = from_text(str(config.get(CODEC)))
    return Instructions(str(config[SCHEME]), server_round, codec, accepted, _read_options(config))


def write_report(content: RecordDict, report: Report) -> None:
    """Write a report into a reply, and the app's metrics into the report."""
    record = ConfigRecord({CLIENT_ID: report.client_id, BASE: report.base, VERSION: report.version})
    _write_options(record, report.options)
    for name, metrics in list(content.metric_records.items()):
        if metrics and "/" not in name:
            for key, value in metrics.items():
                record[f"{name}/{key}"] = cast(Scalar, value)
            del content[name]
    content[FEDKIT] = record


def read_report(content: RecordDict) -> Report:
    """Return the report of a reply; inverse of `write_report`, but for the app's metrics: see `restore_metrics`.

    Raises
    ------
    ReplyError
        If there is none, or it is incomplete.
    """
    record = content.get(FEDKIT)
    if not isinstance(record, ConfigRecord):
        raise ReplyError("the reply holds no report. Is fedkit's mod among the ClientApp's mods?")
    client_id, base, version = (record.get(key) for key in (CLIENT_ID, BASE, VERSION))
    if not (isinstance(client_id, str) and isinstance(base, bytes) and isinstance(version, bytes)):
        raise ReplyError(f"the report is incomplete: it holds {sorted(record)}.")
    return Report(client_id, base, not records_of(content, ArrayRecord), version, _read_options(record))


def restore_metrics(content: RecordDict) -> None:
    """Put the app's metrics back where the app had them, in place; ReplyError if they are none."""
    record = content.get(FEDKIT)
    if not isinstance(record, ConfigRecord):
        return
    for path in [path for path in record if "/" in path]:
        name, _, key = path.partition("/")
        metrics = content.setdefault(name, MetricRecord())
        if not isinstance(metrics, MetricRecord):
            raise ReplyError(f"its metrics {name!r} are another record.")
        try:
            metrics[key] = cast(float, record.pop(path))
        except TypeError:
            raise ReplyError(f"its metric {path!r} is not a number.") from None


def records_of(content: RecordDict, kind: type[R]) -> list[R]:
    """Return the records of one kind; RecordDict's own properties make a new dict each time, at 10 µs."""
    return [record for record in content.values() if isinstance(record, kind)]


def client_id(context: Context) -> str:
    """Return the client's stable name: node config ``client-id``, else ``partition-id``, else the node id."""
    for key in ("client-id", "partition-id"):
        if key in context.node_config:
            return str(context.node_config[key])
    return str(context.node_id)


def _write_options(config: ConfigRecord, options: Mapping[str, Scalar]) -> None:
    for key, value in options.items():
        config[OPTION_PREFIX + key] = value


def _read_options(config: ConfigRecord) -> dict[str, Scalar]:
    return {
        key.removeprefix(OPTION_PREFIX): value
        for key, value in config.items()
        if key.startswith(OPTION_PREFIX) and isinstance(value, bool | int | float | str)
    }


def _config_of(content: RecordDict) -> ConfigRecord | None:
    return next((record for record in records_of(content, ConfigRecord) if SCHEME in record), None)
