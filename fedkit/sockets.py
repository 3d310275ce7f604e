"""The bytes on a TCP port as counted by the kernel: the reference for the ledger."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
from typing import Final, NamedTuple

from fedkit.errors import ConfigError

logger = logging.getLogger(__name__)

_SOCKET: Final = re.compile(r"\bsk:(\w+)")  # the kernel's name of a connection, never used twice
_COUNTS: Final = [re.compile(rf"\b{name}:(\d+)") for name in ("bytes_received", "bytes_sent")]
_SECONDS: Final = 10.0


class Traffic(NamedTuple):
    """Bytes of TCP payload, seen from the port: with TLS and retransmissions, without TCP and IP headers."""

    received: int
    sent: int

    def since(self, before: Traffic) -> Traffic:
        """Return what was added after `before`."""
        return Traffic(self.received - before.received, self.sent - before.sent)


class SocketMeter:
    """Reads the traffic of all connections of a local port. Linux only; no privileges needed.

    A closed connection keeps the value of its last reading: with SuperNodes that come and go, read often. If a
    reading fails, it returns the previous values, and the next one catches up.

    Parameters
    ----------
    port : int
        The listening port, such as that of the SuperLink's Fleet API.

    Raises
    ------
    ConfigError
        If there is no `ss`, or it gets nothing from the kernel.
    """

    def __init__(self, port: int) -> None:
        self.port, program = port, shutil.which("ss")
        if program is None:
            raise ConfigError("cannot count bytes on sockets: no program `ss`. It is part of iproute2, for Linux.")
        self._command = [program, "-tineHO", "state", "connected", "sport", "=", f":{port}"]
        self._connections: dict[str, Traffic] = {}
        try:
            self._update()
        except (OSError, subprocess.SubprocessError) as error:
            raise ConfigError(f"cannot count bytes on sockets: {error}.") from None

    def read(self) -> Traffic:
        """Return the bytes received and sent by the port since its connections began."""
        try:
            self._update()
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("port %d was not read: %s", self.port, error)
        connections = self._connections.values()
        return Traffic(sum(c.received for c in connections), sum(c.sent for c in connections))

    def _update(self) -> None:
        done = subprocess.run(self._command, capture_output=True, text=True, timeout=_SECONDS, check=True)
        self._connections |= parse(done.stdout)


def parse(listing: str) -> dict[str, Traffic]:
    """Return the traffic of each connection in what `ss -tineHO` prints, by the kernel's name for it.

    >>> parse("ESTAB 0 0 [::1]:80 [::1]:4 ino:5 sk:1a <-> bytes_sent:300 bytes_acked:300 bytes_received:1000")
    {'1a': Traffic(received=1000, sent=300)}
    """
    found = {}
    for line in listing.splitlines():
        counts = [pattern.search(line) for pattern in _COUNTS]
        name = _SOCKET.search(line)
        if name and any(counts):  # for a closing connection, the kernel may have dropped them
            found[name[1]] = Traffic(*(int(count[1]) if count else 0 for count in counts))
    return found
