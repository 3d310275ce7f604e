"""The one module that knows how Flower's versions differ, and that uses non-public parts of Flower.

Tested with flwr 1.39.0 (SuperNodes speak gRPC) and 1.41.0 (HTTP).
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.serde import context_from_proto, context_to_proto  # noqa: TID251
from flwr.proto.message_pb2 import Context as ContextProto
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import (  # noqa: TID251
    get_all_nested_objects,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents  # noqa: TID251
from flwr.supercore.task_identity import TaskIdentity  # noqa: TID251

__all__ = [
    "FLEET_IS_GRPC",
    "ClientAppCallable",
    "GridWrapper",
    "Mod",
    "Tls",
    "context_from_bytes",
    "context_to_bytes",
    "deflate",
    "inflate",
    "is_unavailable",
    "mods_of",
    "object_bytes",
    "object_sizes",
    "raised",
    "refusal",
    "superexec",
    "superlink_arguments",
    "task_identity",
    "unavailable",
]

FLEET_IS_GRPC: Final = [int(part) for part in version("flwr").split(".")[:2]] < [1, 40]
"""Whether SuperNodes speak gRPC, at a separate port of the SuperLink; if not, HTTP at its only port."""

_RAISED: Final = 2  # from flwr's private ErrorCode, as are the next two
_UNAVAILABLE: Final = range(3, 6)  # message, reply or node unavailable
_MOD_FAILED_PRECONDITION: Final = 6


class _FlowersLog(logging.Handler):
    """Writes fedkit's log records where Flower's own go, including the log stream of a run."""

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a record on."""
        for handler in logging.getLogger("flwr").handlers:
            if record.levelno >= handler.level:
                handler.handle(record)


logging.getLogger("fedkit").addHandler(_FlowersLog())
logging.getLogger("fedkit").setLevel(logging.INFO)


def deflate(message: Message) -> tuple[str, dict[str, bytes]]:
    """Return the id of a message and all its objects, by id, as Flower sends them."""
    with no_object_id_recompute():  # as Flower does; else an object is hashed again for each one around it
        objects = {object_id: item.deflate() for object_id, item in get_all_nested_objects(message).items()}
        return message.object_id, objects


def inflate(object_id: str, objects: dict[str, bytes], *, message_id: str = "") -> Message:
    """Return the message that `deflate` took apart; its id is not among its objects."""
    message = inflate_object_from_contents(object_id, dict(objects))
    if not isinstance(message, Message):
        raise TypeError(f"expected a Message, got {type(message).__name__}.")
    message.metadata.__dict__["_message_id"] = message_id  # as Flower does
    return message


def context_to_bytes(context: Context) -> bytes:
    """Return a Context as Flower sends it to a ClientApp and back."""
    data: bytes = context_to_proto(context).SerializeToString()
    return data


def context_from_bytes(data: bytes) -> Context:
    """Return the Context that `context_to_bytes` was given."""
    return context_from_proto(ContextProto.FromString(data))


def mods_of(app: ClientApp) -> list[Mod]:
    """Return the mods of a ClientApp, outermost first."""
    return list(app._mods)


def superexec() -> int | None:
    """Return the id of the process that starts this node's ClientApp for each message, from within that app.

    None elsewhere, above all in a simulation, whose processes serve many messages; and where Flower installs the
    app's packages for each message and removes them afterwards.
    """
    installed = any("runtime-envs" in Path(entry).parts for entry in sys.path)
    if Path(sys.argv[0]).name != "flwr-clientapp" or installed:
        return None
    return os.getppid() or None  # 0: it is outside this container, which ends with the message


def object_sizes(message: Message) -> list[int]:
    """Return the sizes in bytes of the objects of a message, as Flower sends them, each with a call of its own."""
    return [len(data) for data in deflate(message)[1].values()]


def object_bytes(message: Message) -> int:
    """Return the size in bytes of all objects of a message, as Flower sends them."""
    return sum(object_sizes(message))


def refusal(reason: str, *, reply_to: Message) -> Message:
    """Return the error reply of a mod that cannot continue."""
    return Message(Error(_MOD_FAILED_PRECONDITION, reason), reply_to=reply_to)


def raised(error: Exception, *, reply_to: Message) -> Message:
    """Return Flower's error reply for an exception in a ClientApp."""
    return Message(Error(_RAISED, f"{type(error)}:<'{error}'>"), reply_to=reply_to)


def is_unavailable(reply: Message) -> bool:
    """Return whether this is Flower's own answer on behalf of a node that will not reply."""
    return bool(reply.has_error() and reply.error.code in _UNAVAILABLE)


def unavailable(message: Message) -> Message:
    """Return Flower's answer on behalf of a node that went offline."""
    return Message(Error(_UNAVAILABLE[-1], "lost by the fault schedule"), reply_to=message)


@contextmanager
def task_identity(*, run_id: int, node_id: int) -> Iterator[None]:
    """Let this process create messages outside a Flower run, as tests do."""
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = 1, run_id, node_id
    try:
        yield
    finally:
        TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


class GridWrapper(Grid):
    """A Grid that passes every call on to another one."""

    def __init__(self, inner: Grid) -> None:
        self.inner = inner

    def set_run(self, run) -> None:  # type: ignore[no-untyped-def]  # the type of `run` is private to Flower
        """Set the run, as Grid does."""
        self.inner.set_run(run)

    @property
    def run(self):  # type: ignore[no-untyped-def]
        """The run, as Grid has it."""
        return self.inner.run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message, as Grid does."""
        return self.inner.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes, as Grid does."""
        return self.inner.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages, as Grid does."""
        return self.inner.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Fetch replies, as Grid does."""
        return self.inner.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for the replies, as Grid does."""
        return self.inner.send_and_receive(messages, timeout=timeout)


@dataclass(frozen=True, slots=True)
class Tls:
    """PEM files of a SuperLink: its certificate, the certificate's key, and the authority that signed it."""

    ca: Path
    certificate: Path
    key: Path


def superlink_arguments(
    port: int, fleet_port: int, *, host: str = "127.0.0.1", tls: Tls | None = None, database: Path | None = None
) -> list[str]:
    """Return the arguments of `flower-superlink` for a deployment.

    Parameters
    ----------
    port : int
        Port of the Control and Runtime APIs, which are HTTP.
    fleet_port : int
        Port of the Fleet API; the same as `port` unless `FLEET_IS_GRPC`.
    host : str
        The address to listen at.
    tls : Tls, optional
        If given, all APIs are encrypted, and only SuperNodes with registered keys may connect.
    database : Path, optional
        An SQLite file; without it, the state is in memory.
    """
    arguments = ["--host", host, "--port", str(port)]
    if FLEET_IS_GRPC:
        arguments += ["--fleet-api-type", "grpc-rere", "--fleet-api-address", f"{host}:{fleet_port}"]
    if database is not None:
        arguments += ["--database", str(database)]
    if tls is None:
        return [*arguments, "--insecure"]
    files = [
        "--ssl-ca-certfile",
        str(tls.ca),
        "--ssl-certfile",
        str(tls.certificate),
        "--ssl-keyfile",
        str(tls.key),
    ]
    return [*arguments, *files, "--enable-supernode-auth"]
