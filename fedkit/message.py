"""Every Flower record that fedkit writes or reads, and its keys.

A *train* or *evaluate* message holds one `Array` of stype ``fedkit/1``, whose data is a parcel of one frame or
more, and fedkit's instructions among the app's own config. A reply holds one frame, or none if the client chose to
skip or only evaluated, and a ConfigRecord ``fedkit`` with the report. In transit, the app's metrics are part of
the report: one record less saves one call, whose overhead is 0.8 kB (`fedkit.ledger`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, TypeVar, cast

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict

from fedkit.codec.names import from_text, to_text
from fedkit.codec.wire import Codec
from fedkit.config import Scalar
from fedkit.errors import ConfigError, ReplyError, WireFormatError
from fedkit.ordinary import from_arrays as from_arrays
from fedkit.ordinary import to_arrays as to_arrays
from fedkit.row_masks import RowDraw

R = TypeVar("R", ArrayRecord, MetricRecord, ConfigRecord)

STYPE: Final = "fedkit/1"
FRAME: Final = "frame"  # the name of the one Array of a message
MAX_NAME, MAX_METRICS = 256, 1024  # characters of a client's id, or of a metric's name; metrics of a reply
FEDKIT: Final = "fedkit"  # the ConfigRecord of a reply

SERVER_ROUND: Final = "server-round"
STEP_SIZE: Final = "step-size"  # of `Aquila` and others; in the app's config, and among the options
SCHEME: Final = "fedkit-scheme"
CODEC: Final = "fedkit-codec"
ACCEPTED: Final = "fedkit-accepted"
EXPERIMENT: Final = "fedkit-experiment"
ORDINARY: Final = "fedkit-ordinary"
INTRODUCE: Final = "fedkit-introduce"
OPTION_PREFIX: Final = "fedkit-option-"

CLIENT_ID: Final = "client-id"
BASE: Final = "base"
VERSION: Final = "version"
BESIDE: Final = "beside"
SUBMODEL: Final = "submodel"  # a key of a node's config, and an option of its reports
PROFILE: Final = "profile"  # likewise, of its first report: what its device can carry
CODING: Final = "coding"  # an option of TAC: the scheme whose mod codes the slots; none: uncoded
LORA: Final = "lora"  # an option of instructions: which part of LoRA factors stays on the client


@dataclass(frozen=True, slots=True)
class Instructions:
    """What the server tells one node for one round."""

    scheme: str  # whose mod is meant
    server_round: int
    codec: Codec  # how to code the upload
    accepted: bytes  # digest of the uploads that the server has accepted from this client
    options: Mapping[str, Scalar] = field(default_factory=dict)  # what this scheme alone needs
    experiment: str = ""  # an id of this run, the same after each resumption
    ordinary: bytes = b""  # what float32 arrays cannot represent of the app's: `fedkit.ordinary`
    introduce: bool = False  # whether the node is only asked which client it is


@dataclass(frozen=True, slots=True)
class Report:
    """What a client says about its upload."""

    client_id: str  # stable name of the client, not Flower's random node id
    base: bytes  # digest of the memory that the upload adds to
    skipped: bool  # answered, but chose to send nothing
    version: bytes  # of the arrays that the client holds
    options: Mapping[str, Scalar] = field(default_factory=dict)  # what this scheme alone needs
    beside: bytes = b""  # what is sent beside the frame: `fedkit.ordinary`


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
    config[EXPERIMENT] = instructions.experiment
    if instructions.ordinary:
        config[ORDINARY] = instructions.ordinary
    if instructions.introduce:
        config[INTRODUCE] = True
    _write_options(config, instructions.options)


def read_scheme(message: Message) -> str | None:
    """Return the scheme that made a message; None for an ordinary Flower message."""
    config = config_of(message.content)
    return None if config is None else str(config[SCHEME])


def read_instructions(message: Message) -> Instructions:
    """Return the instructions of a message; inverse of `write_instructions`.

    Raises
    ------
    ConfigError
        If the message has none, or they are incomplete.
    """
    config = config_of(message.content)
    if config is None:
        raise ConfigError(f"the message has no {SCHEME!r} in its config.")
    server_round, accepted = config.get(SERVER_ROUND), config.get(ACCEPTED)
    if not isinstance(server_round, int) or not isinstance(accepted, bytes):
        raise ConfigError(f"the message's {SERVER_ROUND!r} or {ACCEPTED!r} is missing or of a wrong type.")
    return Instructions(
        scheme=str(config[SCHEME]),
        server_round=server_round,
        codec=from_text(str(config.get(CODEC))),
        accepted=accepted,
        options=_read_options(config),
        experiment=str(config.get(EXPERIMENT, "")),
        ordinary=cast(bytes, config.get(ORDINARY, b"")),
        introduce=bool(config.get(INTRODUCE, False)),
    )


def rows_of(message: Message) -> RowDraw | None:
    """Return which components of LoRA factors the app is to train in this round; None: all of them."""
    return RowDraw.from_options(read_instructions(message).options) if read_scheme(message) else None


def write_report(content: RecordDict, report: Report) -> None:
    """Write a report into a reply, and the app's metrics into the report."""
    record = ConfigRecord({CLIENT_ID: report.client_id, BASE: report.base, VERSION: report.version})
    if report.beside:
        record[BESIDE] = report.beside
    _write_options(record, report.options)
    for name, metrics in list(content.metric_records.items()):
        if metrics and "/" not in name:
            for key, value in metrics.items():
                record[f"{name}/{key}"] = cast(Scalar, value)
            del content[name]
    content[FEDKIT] = record


def read_report(content: RecordDict) -> Report:
    """Return the report of a reply; inverse of `write_report`, except for metrics: see `restore_metrics`.

    Raises
    ------
    ReplyError
        If there is none, or it is incomplete.
    """
    record = content.get(FEDKIT)
    if not isinstance(record, ConfigRecord):
        raise ReplyError("the reply holds no report. Is fedkit's mod among the ClientApp's mods?")
    client_id, base, version = (record.get(key) for key in (CLIENT_ID, BASE, VERSION))
    beside = record.get(BESIDE, b"")
    if not (isinstance(client_id, str) and all(isinstance(each, bytes) for each in (base, version, beside))):
        raise ReplyError(f"the report is incomplete: it holds {sorted(record)}.")
    base, version, beside = cast(tuple[bytes, bytes, bytes], (base, version, beside))
    if not 0 < len(client_id) <= MAX_NAME or not client_id.isprintable() or not len(base) == len(version) == 16:
        raise ReplyError(f"client id {client_id[:20]!r} (1 to {MAX_NAME} letters), or digests not of 16 bytes.")
    skipped = not records_of(content, ArrayRecord)
    return Report(client_id, base, skipped, version, _read_options(record), beside)


def restore_metrics(content: RecordDict) -> None:
    """Put the app's metrics back where the app had them, in place; ReplyError if they are not metrics."""
    record = content.get(FEDKIT)
    if not isinstance(record, ConfigRecord):
        return
    paths = [path for path in record if "/" in path]
    if len(paths) > MAX_METRICS or any(len(path) > MAX_NAME for path in paths):
        raise ReplyError(f"its metrics: expected at most {MAX_METRICS}, with names of at most {MAX_NAME} letters.")
    for path in paths:
        name, _, key = path.partition("/")
        metrics = content.setdefault(name, MetricRecord())
        if not isinstance(metrics, MetricRecord):
            raise ReplyError(f"its metrics {name!r} are another record.")
        try:
            metrics[key] = cast(float, record.pop(path))
        except TypeError:
            raise ReplyError(f"its metric {path!r} is not a number.") from None


def records_of(content: RecordDict, kind: type[R]) -> list[R]:
    """Return the records of one kind; RecordDict's own properties build a new dict each time, in 10 µs."""
    return [record for record in content.values() if isinstance(record, kind)]


def round_of(message: Message) -> int:
    """Return the round that a message of a strategy is for; 0 if it does not say."""
    for record in records_of(message.content, ConfigRecord):
        if isinstance(server_round := record.get(SERVER_ROUND), int):
            return server_round
    return 0


def client_id(context: Context) -> str:
    """Return the client's stable name: node config ``client-id``, else ``partition-id``, else the node id."""
    for key in ("client-id", "partition-id"):
        if key in context.node_config:
            return str(context.node_config[key])
    return str(context.node_id)


def run_config_of(message: Message, context: Context) -> dict[str, Scalar]:
    """Return the run config, overridden by the message's config where that has the same keys.

    Those values were decided by the strategy for this node (`fedkit.strategies.Terms`), or for this round (the
    ``train_config`` of Flower's `start`).
    """
    run_config = dict(context.run_config)
    told = {key: value for record in records_of(message.content, ConfigRecord) for key, value in record.items()}
    return {key: cast(Scalar, told.get(key, value)) for key, value in run_config.items()}


def _write_options(config: ConfigRecord, options: Mapping[str, Scalar]) -> None:
    for key, value in options.items():
        config[OPTION_PREFIX + key] = value


def _read_options(config: ConfigRecord) -> dict[str, Scalar]:
    return {
        key.removeprefix(OPTION_PREFIX): value
        for key, value in config.items()
        if key.startswith(OPTION_PREFIX) and isinstance(value, bool | int | float | str)
    }


def config_of(content: RecordDict) -> ConfigRecord | None:
    """Return the ConfigRecord that holds fedkit's instructions; None if there is none."""
    return next((record for record in records_of(content, ConfigRecord) if SCHEME in record), None)
