"""The program of a worker process; `fedkit.clients.worker` starts it and passes its arguments.

It serves one call at a time. Time limits are left to the kernel: if the app takes longer than the time to live of
its message, an alarm ends the process, whatever it hangs in. What the app prints goes to the output of the
ClientApp, or nowhere while there is no call.
"""

from __future__ import annotations

import gc
import importlib
import logging
import os
import random
import signal
import socket
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from pathlib import Path
from typing import Final

import numpy as np
from flwr.clientapp import ClientApp

from fedkit.calls import check_user, is_alive, pack, receive, receive_exactly, send, unpack
from fedkit.errors import ConfigError, StateError
from fedkit.flower import raised, task_identity

from .worker import OTHER, OURS

logger = logging.getLogger(__name__)

POLL_SECONDS: Final = 1.0
_RECEIVE_SECONDS: Final = 60.0  # for a call to arrive


class Server:
    """Serves the calls of a node's ClientApps.

    Parameters
    ----------
    path : Path
        The path of the socket on which `listener` listens.
    key : str
        The key of the node, run and app that the server is for; it ends after a call with another key.
    root : Path
        The app's folder.
    node : int
        The id of the node's process; the server ends with it.
    seconds : float
        How long the server may be idle.
    listener : socket
        The socket that calls come from.
    """

    def __init__(
        self, path: Path, key: str, root: Path, node: int, seconds: float, listener: socket.socket
    ) -> None:
        self.path, self.key, self.root, self.node = path, key, root, node
        self.seconds, self.listener = seconds, listener
        self.inode, self.wanted = path.stat().st_ino, True
        self.app: ClientApp | None = None

    def serve(self) -> None:
        """Serve calls until the worker has been idle for too long, or is no longer wanted."""
        last = time.monotonic()
        while self.wanted and is_alive(self.node) and time.monotonic() - last < self.seconds:
            if wait([self.listener], POLL_SECONDS):
                self._next()
                last = time.monotonic()
        self._retire()
        while wait([self.listener], 0):  # callers that came before
            self._next()

    def _retire(self) -> None:
        """Accept no new callers."""
        self.wanted = False
        with suppress(FileNotFoundError):
            if self.path.stat().st_ino == self.inode:  # the path may be a successor's by now
                self.path.unlink()

    def _next(self) -> None:
        """Serve the next caller."""
        connection, _ = self.listener.accept()
        with connection, suppress(StateError, OSError):  # the caller may have gone
            connection.settimeout(_RECEIVE_SECONDS)
            check_user(connection)
            if receive_exactly(connection, len(self.key)).decode() == self.key:
                connection.sendall(OURS)
                self._call(connection)
            else:
                self._retire()
                connection.sendall(OTHER)
        gc.collect()  # while nobody waits

    def _call(self, connection: socket.socket) -> None:
        """Receive a call, serve it, and send the reply."""
        _, outputs, _, _ = socket.recv_fds(connection, len(OURS), 2)
        with printing_to(outputs):
            message, context = unpack(receive(connection))
            with at_most(message.metadata.ttl), self._while_wanted(connection):
                forget_chance()
                with task_identity(run_id=context.run_id, node_id=context.node_id):
                    try:
                        reply = self._app()(message, context)
                        parts = pack(reply, context)
                    except Exception as error:  # as Flower does
                        logger.error("ClientApp raised an exception", exc_info=error)
                        parts = pack(raised(error, reply_to=message), context)
            send(connection, parts)

    def _app(self) -> ClientApp:
        """Return the app, loaded in the way Flower loads it; the first call takes a while."""
        if self.app is None:
            config = tomllib.loads((self.root / "pyproject.toml").read_text(encoding="utf-8"))
            module, _, name = config["tool"]["flwr"]["app"]["components"]["clientapp"].partition(":")
            if str(self.root) not in sys.path:
                sys.path.insert(0, str(self.root))
            app = importlib.import_module(module)
            for part in name.split("."):
                app = getattr(app, part)
            if not isinstance(app, ClientApp):
                raise ConfigError(f"{module}:{name}: expected a ClientApp, got {type(app).__name__}.")
            self.app = app
        return self.app

    @contextmanager
    def _while_wanted(self, connection: socket.socket) -> Iterator[None]:
        """End this process if the ClientApp or the node's process ends before the block does."""
        end, ended = socket.socketpair()

        def watch() -> None:
            while ended not in (ready := wait([connection, ended], POLL_SECONDS)):
                if ready or not is_alive(self.node):
                    self._retire()
                    os._exit(1)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield
        finally:
            end.close()
            thread.join()
            ended.close()


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Let SIGALRM end this process if the block takes longer than `seconds`."""
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


@contextmanager
def printing_to(outputs: Sequence[int]) -> Iterator[None]:
    """Redirect this process's standard output and error to two open files, which are closed in the end."""
    for number, output in enumerate(outputs, 1):
        os.dup2(output, number)
        os.close(output)
    try:
        yield
    finally:
        print_nowhere()


def print_nowhere() -> None:
    """Redirect standard output and error to nowhere, so that their readers need not wait for this process."""
    sys.stdout.flush()
    sys.stderr.flush()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)


def forget_chance() -> None:
    """Seed the random generators from the system, as in a new process."""
    random.seed()
    np.random.seed()
    if torch := sys.modules.get("torch"):
        torch.seed()


def main() -> None:
    """Run a `Server` with the arguments of the command line."""
    path, key, root, node, seconds, listener = sys.argv[1:]
    print_nowhere()
    listening = socket.socket(fileno=int(listener))
    Server(Path(path), key, Path(root), int(node), float(seconds), listening).serve()


if __name__ == "__main__":
    main()
