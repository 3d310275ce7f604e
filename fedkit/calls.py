"""Calls of a ClientApp from one process to another of the same user, over a Unix socket.

The sockets are in a folder that only their user can enter, and each side asks the kernel who is at the other end.
What is sent are lists of byte strings: a message and its Context, as Flower itself sends them.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
import struct
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flwr.app import Context, Message

from fedkit.errors import StateError
from fedkit.flower import context_from_bytes, context_to_bytes, deflate, inflate


def pack(message: Message, context: Context) -> list[bytes]:
    """Return a message and its Context as byte strings."""
    object_id, objects = deflate(message)
    ids = json.dumps([message.metadata.message_id, object_id, *objects])
    return [ids.encode(), context_to_bytes(context), *objects.values()]


def unpack(parts: Sequence[bytes]) -> tuple[Message, Context]:
    """Return the message and the Context that `pack` was given."""
    ids, context, *objects = parts
    message_id, object_id, *names = json.loads(ids)
    message = inflate(object_id, dict(zip(names, objects, strict=True)), message_id=message_id)
    return message, context_from_bytes(context)


def send(connection: socket.socket, parts: Sequence[bytes]) -> None:
    """Send byte strings."""
    connection.sendall(struct.pack(f"<I{len(parts)}Q", len(parts), *map(len, parts)))
    for part in parts:
        connection.sendall(part)


def receive(connection: socket.socket) -> list[bytes]:
    """Return the byte strings that the other side sent; raise ConnectionError if it has gone."""
    (count,) = struct.unpack("<I", receive_exactly(connection, 4))
    sizes = struct.unpack(f"<{count}Q", receive_exactly(connection, 8 * count))
    return [receive_exactly(connection, size) for size in sizes]


def receive_exactly(connection: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes; raise ConnectionError if the other side has gone."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        if not (count := connection.recv_into(rest)):
            raise ConnectionResetError("the connection broke")
        rest = rest[count:]
    return bytes(data)


def check_user(connection: socket.socket) -> None:
    """Raise StateError if the process at the other end is another user's; checked only on Linux."""
    if sys.platform == "linux":
        size = struct.calcsize("3i")
        _, user, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
        if user != os.getuid():
            raise StateError(f"a socket: expected a process of user {os.getuid()} at the other end, got {user}.")


def private_folder() -> Path:
    """Return the folder for this user's sockets; create it if needed.

    Raises
    ------
    StateError
        If it does not belong to this user alone.
    OSError
        If it cannot be created.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    known = runtime and Path(runtime).is_dir()
    folder = Path(runtime, "fedkit") if known else Path(tempfile.gettempdir(), f"fedkit-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StateError(f"{folder}: expected a folder that user {os.getuid()} alone can enter. Remove it.")
    return folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Let only one process at a time into the block."""
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # released with the file, and so with the process
        yield


def is_alive(pid: int) -> bool:
    """Return whether a process of this user exists."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
