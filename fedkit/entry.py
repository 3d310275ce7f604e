"""One message in the ledger: its sizes, from the ideal bits to the socket, and what became of it.

From objects to the socket
--------------------------
In a deployment over gRPC, a SuperNode fetches each object of a message from the SuperLink in a call of its own,
and pushes each object of its reply in another; each call has a request up and a response down. With n objects:

==========  =====  =========================================  ==========================================
message     calls  besides calls and objects, up              besides calls and objects, down
==========  =====  =========================================  ==========================================
downlink    n + 2  76 (n + 1): object and run in n requests   76 n + 129: tree of ids, protobuf, metadata
                   and in the confirmation
uplink      n + 1  186 n + 205: tree of ids, metadata; id,    68 n + 110: ids to be pushed, session
                   run, session and protobuf in n requests
==========  =====  =========================================  ==========================================

An id is 64 hexadecimal digits. `CALL` is the overhead of a call in bytes, read from the HTTP/2 frames:

- up: headers 514, DATA with the node's id 27, two WINDOW_UPDATE 26, PING 9. All but 10 of the headers are literals
  that Flower sends again with each call: the node's public key as PEM, its signature, the time, Flower's version.
- down: headers and trailers 37, DATA 14, WINDOW_UPDATE 12, PING 9.

Of successive calls, half come with a PING and an answer, 17 bytes each, in both directions; of the calls of idle
nodes, all do: about 602 bytes up and 98 down. `Entry.socket` returns this sum. It is too high where Flower need
not send an object that the other side already has, such as equal metrics of two clients.
``python -m benchmarks.wire`` compares it with the kernel's count.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from fedkit.sockets import Traffic

Direction: TypeAlias = Literal["uplink", "downlink"]
Fate: TypeAlias = Literal["", "skip", "rejected", "error", "lost", "late"]
"""What became of a reply: used, as far as known; skipped by choice; refused; an error; withheld by the fault
schedule; too late, and dropped."""
CALL: Final = Traffic(received=576, sent=72)  # flwr 1.39.0 over gRPC, without TLS


@dataclass(slots=True)
class Entry:
    """One message that was sent. Each of its sizes includes the next smaller one.

    The difference between frames and objects is Flower's overhead: the records' names, the app's config and
    metrics, and about 60 bytes for each object. Between objects and the socket it is calls: see `socket`.
    """

    server_round: int
    client: str  # its id; the node id until it has answered once
    node_id: int
    direction: Direction
    kind: str  # Flower's message type: train or evaluate
    object_bytes: int  # all of the message's Flower objects
    frame_bytes: int  # the data of its arrays
    objects: int  # number of objects, each with a call of its own
    ideal_bits: float = 0.0  # order-0 entropy of what the frames hold; 0 if unknown
    fate: Fate = ""  # of an upload

    def socket(self, call: Traffic = CALL) -> Traffic:
        """Return the traffic of the message on the SuperLink's socket; see the module's docstring."""
        n = self.objects
        if self.direction == "downlink":
            calls, up, down = n + 2, 76 * (n + 1), self.object_bytes + 76 * n + 129
        else:
            calls, up, down = n + 1, self.object_bytes + 186 * n + 205, 68 * n + 110
        return Traffic(calls * call.received + up, calls * call.sent + down)
