"""What a client remembers between rounds, trusted only once the server has acknowledged it.

In a lazy scheme, the client keeps a copy of what the server already has from it. If a reply is lost after the
client updated that memory, the two differ forever without any sign of it. So the client *stages* each upload; with
its next message the server sends the digest of what it has accepted from that client; the client then *settles*:

==========================================  ===================================================
the server's digest is that of              the client
==========================================  ===================================================
the memory with the staged upload           commits: the upload arrived
the memory without it                       rolls back: the upload was lost
anything else                               forgets: one of the two lost its state
==========================================  ===================================================

A digest is a running hash of the accepted frames, so its cost does not depend on the age of the memory; without
any frames it is `GENESIS`. A client that forgot codes its next upload against zeros and says so by naming
`GENESIS` as its base; the server then replaces what it had. A new client sends the same message, so there is no
separate resynchronisation that could go wrong.

A server that crashed runs its last round again. A memory that the client keeps although its upload was lost
(`Residual`) then already includes that round, which must not count twice: see `rewind`.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import MutableMapping
from typing import Final

from fedkit.arrays import NamedArrays, add, subtract, zeros_like
from fedkit.codec.wire import Codec, decode
from fedkit.errors import CodecError
from fedkit.row_masks import RowDraw
from fedkit.submodels import embed, shapes

logger = logging.getLogger(__name__)

GENESIS: Final = bytes(16)  # the digest of a memory that nothing was added to
_BEGUN: Final = "begun"  # in the state: the round that began last


def chain(digest: bytes, frame: bytes) -> bytes:
    """Return the digest of a memory after `frame` was added to it, 16 bytes."""
    return hashlib.blake2b(digest + frame, digest_size=16).digest()


def rewind(state: MutableMapping[str, bytes], scheme: str, server_round: int) -> None:
    """If a round is begun again, restore what `scheme` remembered when it first began.

    The scheme's entries of `state` are those whose names begin with its name; each new round copies them.
    """
    own, before, now = f"{scheme}.", f"before.{scheme}.", server_round.to_bytes(8, "big")
    again = state.get(_BEGUN) == now
    source, target = (before, own) if again else (own, before)
    for name in [name for name in state if name.startswith(target)]:
        del state[name]
    for name in [name for name in state if name.startswith(source)]:
        state[target + name.removeprefix(source)] = state[name]
    state[_BEGUN] = now


class ClientMemory:
    """The client's copy of what the server has from it.

    Each upload that arrived is added; see `Residual` for the other kind of memory.

    Parameters
    ----------
    state : mutable mapping of str to bytes
        The client's state (`fedkit.state`), which outlives the ClientApp.
    scheme : str
        The scheme that the memory belongs to; schemes do not share memories.
    like : NamedArrays
        Arrays with the names and shapes of an upload.
    """

    def __init__(self, state: MutableMapping[str, bytes], scheme: str, *, like: NamedArrays) -> None:
        self._state, self._like = state, like
        self._arrays, self._digest, self._upload = (f"{scheme}.{part}" for part in ("memory", "digest", "staged"))
        self._rows = f"{scheme}.staged-rows"
        self.digest, self.arrays, self._staged = self._load()

    def settle(self, accepted: bytes) -> NamedArrays:
        """Commit, roll back or forget, by the digest of what the server accepted; return the memory."""
        if self._staged is not None and chain(self.digest, self._staged) == accepted:
            self.arrays = self._committed(self._uploaded(self._staged))
            self.digest = accepted
        elif accepted != self.digest:
            if self.digest != GENESIS or accepted != GENESIS:
                logger.warning("The server knows another history of this client: starting anew.")
            self.arrays, self.digest = zeros_like(self._like), GENESIS
        self._staged = None
        self._save()
        return self.arrays

    def stage(self, frame: bytes, rows: RowDraw | None = None) -> None:
        """Remember an upload, of some rows or of all, until the server says whether it arrived."""
        self._staged = frame
        self._save()
        if rows is not None:
            self._state[self._rows] = str(rows).encode()

    def _uploaded(self, frame: bytes) -> NamedArrays:
        """Return what was staged, with zeros in the rows that it does not cover."""
        if self._rows not in self._state:
            return decode(frame, like=self._like)
        part = RowDraw.from_str(self._state[self._rows].decode()).submodel(self._like)
        return embed(decode(frame, like=shapes(part, like=self._like)), part, like=self._like)

    def _committed(self, upload: NamedArrays) -> NamedArrays:
        return add(self.arrays, upload)

    def _load(self) -> tuple[bytes, NamedArrays, bytes | None]:
        if self._digest in self._state:
            try:
                arrays = decode(self._state[self._arrays], like=self._like)
            except (CodecError, KeyError) as error:
                logger.warning("The memory cannot be used (%s): starting anew.", error)
            else:
                return self._state[self._digest], arrays, self._state.get(self._upload)
        return GENESIS, zeros_like(self._like), None

    def _save(self) -> None:
        self._state.pop(self._rows, None)
        self._state[self._arrays], self._state[self._digest] = Codec().encode(self.arrays), self.digest
        if self._staged is None:
            self._state.pop(self._upload, None)
        else:
            self._state[self._upload] = self._staged


class Residual(ClientMemory):
    """What the server has not received from this client yet: the memory of error feedback.

    `keep` what is to be sent, then `stage` its frame. An upload that arrived is subtracted. One that was lost
    leaves everything to be sent later; unless `keeps`, it is subtracted as well, since others stood in for it.
    """

    keeps = True

    def settle(self, accepted: bytes) -> NamedArrays:
        """Settle as `ClientMemory.settle` does; unless `keeps`, a lost upload is subtracted as well."""
        if self._staged is not None and accepted == self.digest and not self.keeps:
            self.arrays = self._committed(self._uploaded(self._staged))
        return super().settle(accepted)

    def keep(self, arrays: NamedArrays) -> None:
        """Replace what the server has not received."""
        self.arrays = arrays

    def _committed(self, upload: NamedArrays) -> NamedArrays:
        return subtract(self.arrays, upload)
