"""A process that stays for the messages to come, so that what an app has loaded stays with it.

In a deployment, a SuperNode starts a new process for every message, and importing torch and loading the model
takes seconds, each time. With `WarmWorker`, outermost of the mods, that process hands the message on to a worker::

    SuperNode ── SuperExec ─┬─ flwr-clientapp ── message, Context ─▶ worker: the same app, with all its mods
                            │   (one per message)  ◀─ reply, Context ──┘  (one per node, run and app)
                            └─ is watched by the worker, which ends when it has gone

Flower's contract is as it was: the app receives each Message with its Context and returns a Message. What it loads
with `fedkit.clients.kept` is there for the next message, as are all of its modules, just as in a simulation.

- The worker starts with the first message. It ends with its node, for another run or changed files of the app, and
  when it was idle for so many seconds as the node config's ``worker-idle`` says, or else the environment's
  `FEDKIT_WORKER_IDLE`, or else 600. 0: no worker.
- One that is killed, or takes longer than the message's time to live, costs that reply: the node answers with an
  error. A ClientApp that is killed takes the worker's work on its message with it, as it would without a worker.
- In a simulation, where there can be no worker, and where there is none, the app runs in the process it is in.
- A function that is registered with ``@app.lifespan()`` runs in both processes.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from flwr.app import Context, Message

from fedkit.calls import check_user, locked, pack, private_folder, receive, send, unpack
from fedkit.errors import ConfigError, FedkitError, StateError
from fedkit.flower import ClientAppCallable, refusal, superexec

logger = logging.getLogger(__name__)

WORKER_IDLE: Final = "FEDKIT_WORKER_IDLE"
OURS, OTHER = b"+", b"-"  # what a worker says to the key of a node, run and app
_IDLE_SECONDS = 600.0
_GREETING_SECONDS = 60.0  # it answers at once, but must start first, or finish what it is at
_TRIES = 3
_LATE_SECONDS = 5.0  # it ends by itself when the time to live is over


class WarmWorker:
    """Hands messages on to a process that stays; the first of an app's mods: ``WarmWorker(__file__)``.

    Parameters
    ----------
    file : str
        A file of the app, whose folder has a pyproject.toml, or one above.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Return the app's reply, from a worker if there can be one."""
        node = superexec()
        if node is None:
            return call_next(message, context)
        try:
            if not (seconds := idle_seconds(context)):
                return call_next(message, context)
            root = root_of(self.file)
            path = private_folder() / f"{context.node_id % 2**64:016x}.sock"
            connection = Worker(path, key_of(node, context, root), root, node, seconds).reach()
        except (FedkitError, OSError) as error:
            logger.warning("No worker (%s): the app runs in the process of its message.", error)
            return call_next(message, context)
        with connection:
            return _ask(connection, message, context)


@dataclass(frozen=True, slots=True)
class Worker:
    """A node's worker, seen from a ClientApp."""

    path: Path  # of its socket
    key: str  # of node, run and app, 32 characters
    root: Path  # of the app
    node: int  # the process that it ends with
    seconds: float  # that it may be idle

    def reach(self) -> socket.socket:
        """Return a connection to the worker, which is started if need be and waits for a call.

        Raises
        ------
        StateError
            If there is no such worker.
        OSError
            If it cannot be started.
        """
        for _ in range(_TRIES):
            with locked(self.path.parent):
                connection = known = _connect(self.path)
                if connection is None:
                    connection = self._start()
            try:
                if _greet(connection, self.key):
                    return connection
            except TimeoutError:
                self.path.unlink(missing_ok=True)  # the next message shall not wait for it
                connection.close()
                raise StateError(f"it did not answer within {_GREETING_SECONDS:.0f} s") from None
            connection.close()
            if known is None:
                break
        raise StateError("it ended before it could answer")

    def _start(self) -> socket.socket:
        """Start the worker at a socket that it finds open; return a connection."""
        for path in _silent(self.path.parent):
            path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self.path))
            self.path.chmod(0o600)
            listener.listen()
            what = [self.path, self.key, self.root, self.node, self.seconds, listener.fileno()]
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fedkit.clients.worker_process", *map(str, what)],
                stdin=subprocess.DEVNULL,
                pass_fds=[listener.fileno()],
                start_new_session=True,  # what ends the ClientApp shall not end the worker
            )
        logger.info("A worker starts, process %d: it keeps what the app loads for later messages.", process.pid)
        if connection := _connect(self.path):
            return connection
        raise StateError("it ended at once")


def _ask(connection: socket.socket, message: Message, context: Context) -> Message:
    """Return the worker's reply, with what it changed in the Context; if there is none, an error reply."""
    seconds, begin = message.metadata.ttl, time.monotonic()
    connection.settimeout(seconds + _LATE_SECONDS)
    try:
        socket.send_fds(connection, [OURS], [1, 2])  # what the app prints comes out here
        send(connection, pack(message, context))
        reply, changed = unpack(receive(connection))
    except OSError as error:
        late = time.monotonic() - begin >= seconds
        cause = f"it took longer than {seconds:g} s" if late else f"{error}: was it killed, or out of memory?"
        reason = f"the worker gave no reply: {cause}"
        logger.error("%s The next message starts another one.", reason)
        return refusal(reason, reply_to=message)
    vars(context).update(vars(changed))
    return reply


def _greet(connection: socket.socket, key: str) -> bool:
    """Return whether the worker is one for this key; if not, it ends."""
    try:
        connection.sendall(key.encode())
        return connection.recv(1) == OURS
    except ConnectionError:
        return False


def _connect(path: Path) -> socket.socket | None:
    """Return a connection to the worker at `path`; None if there is none."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(_GREETING_SECONDS)
    try:
        connection.connect(str(path))
        check_user(connection)
    except BaseException as error:
        connection.close()
        if isinstance(error, FileNotFoundError | ConnectionRefusedError):
            return None
        raise
    return connection


def _silent(folder: Path) -> Iterator[Path]:
    """Yield the sockets in `folder` that nobody listens at any more."""
    for path in folder.glob("*.sock"):
        if connection := _connect(path):
            connection.close()
        else:
            yield path


def idle_seconds(context: Context) -> float:
    """Return how long a node's worker may be idle; 0: there shall be none."""
    said = context.node_config.get("worker-idle", os.environ.get(WORKER_IDLE, _IDLE_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"worker-idle, or {WORKER_IDLE}: expected seconds, at least 0, got {said!r}.")
    return seconds


def root_of(file: Path) -> Path:
    """Return the folder of the app that a file belongs to; raise ConfigError if there is none."""
    for folder in file.resolve().parents:
        if (folder / "pyproject.toml").exists():
            return folder
    raise ConfigError(f"WarmWorker: found no pyproject.toml above {file}. Give it a file of the app: __file__.")


def key_of(node: int, context: Context, root: Path) -> str:
    """Return what a worker is for: a node's process, a run, the app's files, the installed packages."""
    digest = hashlib.blake2b(digest_size=16)
    packages = [os.stat(sysconfig.get_path(name)).st_mtime_ns for name in ("purelib", "platlib")]
    digest.update(
        json.dumps([node, context.node_id, context.run_id, str(root), sys.executable, packages]).encode()
    )
    for path in sorted(root.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            data = path.read_bytes()
            digest.update(json.dumps([str(path), len(data)]).encode() + data)
    return digest.hexdigest()
