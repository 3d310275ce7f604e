"""A worker process that serves all messages of a node, so that what the app has loaded stays loaded.

In a deployment, a SuperNode starts a new process for every message, and importing torch and loading the model
takes seconds each time. With `WarmWorker` as the outermost mod, that process passes the message on to a worker::

    SuperNode ── SuperExec ─┬─ flwr-clientapp ── message, Context ─▶ worker: the same app, with all its mods
                            │   (one per message)  ◀─ reply, Context ──┘  (one per node, run and app)
                            └─ is watched by the worker, which ends when it has gone

Flower's contract does not change: the app receives each Message with its Context and returns a Message. What it
loads with `fedkit.clients.kept` is still there for the next message, as are all of its modules, just as in a
simulation.

- The worker starts with the first message. It ends when its node ends, when another run begins or the app's files
  change, and when it has been idle for too long. The limit in seconds is ``worker-idle`` in the node config, else
  the environment variable `FEDKIT_WORKER_IDLE`, else 600; 0: no worker.
- If a worker is killed, or takes longer than the message's time to live, that reply is lost: the node answers with
  an error. If a ClientApp is killed, so is the worker's work on its message, as it would be without a worker.
- In a simulation, which has no workers, and wherever no worker can be used, the app runs in its own process.
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
OURS, OTHER = b"+", b"-"  # a worker's answers to a key: its own, or another one
_IDLE_SECONDS = 600.0
_GREETING_SECONDS = 60.0  # it answers at once, but may have to start, or to finish its work, first
_TRIES = 3
_LATE_SECONDS = 5.0  # more than the time to live, at which the worker ends by itself


class WarmWorker:
    """Runs the app in a process that outlives a message. Put it first among the mods: ``WarmWorker(__file__)``.

    Parameters
    ----------
    file : str
        A file of the app. Its folder, or one above, has the app's pyproject.toml.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)

    def __call__(self, message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        """Return the app's reply, from a worker if one can be used."""
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
    """A node's worker, as seen from a ClientApp."""

    path: Path  # of its socket
    key: str  # of node, run and app, 32 characters
    root: Path  # the app's folder
    node: int  # the id of the node's process, with which the worker ends
    seconds: float  # how long it may be idle

    def reach(self) -> socket.socket:
        """Return a connection to the worker, which is started if necessary and waits for a call.

        Raises
        ------
        StateError
            If no worker for this key answers.
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
                self.path.unlink(missing_ok=True)  # so that the next message does not wait for it
                connection.close()
                raise StateError(f"it did not answer within {_GREETING_SECONDS:.0f} s") from None
            connection.close()
            if known is None:
                break
        raise StateError("it ended before it could answer")

    def _start(self) -> socket.socket:
        """Start the worker with a socket that is already listening; return a connection to it."""
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
                start_new_session=True,  # so that what ends the ClientApp does not end the worker
            )
        logger.info("A worker starts, process %d: it keeps what the app loads for later messages.", process.pid)
        if connection := _connect(self.path):
            return connection
        raise StateError("it ended at once")


def _ask(connection: socket.socket, message: Message, context: Context) -> Message:
    """Return the worker's reply and apply its changes to the Context; without a reply, return an error reply."""
    seconds, begin = message.metadata.ttl, time.monotonic()
    connection.settimeout(seconds + _LATE_SECONDS)
    try:
        socket.send_fds(connection, [OURS], [1, 2])  # so that the app prints to this process's output
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
    """Return whether the worker is for this key; if not, the worker ends."""
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
    """Yield the sockets in `folder` on which no process listens any more."""
    for path in folder.glob("*.sock"):
        if connection := _connect(path):
            connection.close()
        else:
            yield path


def idle_seconds(context: Context) -> float:
    """Return how many seconds a node's worker may be idle; 0: use no worker."""
    said = context.node_config.get("worker-idle", os.environ.get(WORKER_IDLE, _IDLE_SECONDS))
    try:
        seconds = float(said)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise ConfigError(f"worker-idle, or {WORKER_IDLE}: expected seconds, at least 0, got {said!r}.")
    return seconds


def root_of(file: Path) -> Path:
    """Return the folder of the app that a file belongs to; raises ConfigError if there is none."""
    for folder in file.resolve().parents:
        if (folder / "pyproject.toml").exists():
            return folder
    raise ConfigError(f"WarmWorker: found no pyproject.toml above {file}. Give it a file of the app: __file__.")


def key_of(node: int, context: Context, root: Path) -> str:
    """Return a key for what a worker serves: a node's process, a run, the app's files, the installed packages."""
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
