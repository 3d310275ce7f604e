"""What the server has from each client: in RAM, or in one file per client.

With files, a server needs RAM for only a few vectors of parameters, however many clients there are, and a client
that left, or whose file is lost, does not affect the others. A file has two slots of the same size::

    0   8 bytes   magic, "fedkit-m"
    8   8         schema: `fedkit.arrays.schema_digest` of the arrays
    16  16        digest of the history that the values stand for
    32  4         CRC-32 of the above and of the values
    36  28        zeros
    64  4 × n     values, float32, little-endian

An update goes to the slot that is not in use, so the previous value survives a crash in the middle of a round;
`Memories.open` finds it by its digest. The checksum covers the whole slot, so that a partial write is not taken
for a value.

Files are read through a memory map but written with plain calls: a full disk makes a call fail, but kills a
process that writes through a map.
"""

from __future__ import annotations

import hashlib
import logging
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import NamedArrays, flatten, num_values, schema_digest, unflatten
from fedkit.errors import StateError

logger = logging.getLogger(__name__)

Vector = NDArray[np.float32]

_MAGIC: Final = b"fedkit-m"
_FIELDS: Final = struct.Struct("<8s8s16s")  # magic, schema, history
_HEADER: Final = struct.Struct("<8s8s16sI28x")  # those, checksum; the values start aligned


class _LostError(Exception):
    """Why a slot has no usable value."""


class Memories(Mapping[str, NamedArrays]):
    """The arrays that the server has from each client, by client id, in sorted order.

    It is changed in place. For each client it knows the digest of the history that its arrays result from.

    Parameters
    ----------
    like : NamedArrays
        Arrays with the names and shapes of a client's.
    folder : Path, optional
        Where the files are; created if needed. None: everything stays in RAM.

    Raises
    ------
    StateError
        From every method, if the folder cannot be written or read. A file that is lost or damaged is no error:
        its client is forgotten, with a warning.
    """

    def __init__(self, like: NamedArrays, folder: Path | None = None) -> None:
        self.folder = folder
        # shapes only: an array with strides of zero keeps no parameters alive
        self._like = {name: np.broadcast_to(np.float32(0), array.shape) for name, array in like.items()}
        self.num_values, self._schema = num_values(like), schema_digest(like)
        self._slot_bytes = _HEADER.size + 4 * self.num_values
        self._digests: dict[str, bytes] = {}
        self._vectors: dict[str, Vector] = {}  # without a folder
        self._slots: dict[str, int] = {}  # with one: which is in use
        self._kept: dict[str, int] = {}  # and which must not be written
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise _unusable(folder, error) from error

    # ---- what is there -------------------------------------------------------------------------

    @property
    def digests(self) -> Mapping[str, bytes]:
        """Return the digest of each client's history, 16 bytes."""
        return MappingProxyType(self._digests)

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._digests))

    def __len__(self) -> int:
        return len(self._digests)

    def __contains__(self, client_id: object) -> bool:
        return client_id in self._digests

    def __getitem__(self, client_id: str) -> dict[str, Vector]:
        """Return a copy of a client's arrays."""
        vector = self.vector(client_id)
        if vector is None:
            raise KeyError(client_id)
        return unflatten(vector.copy(), like=self._like)

    def vector(self, client_id: str) -> Vector | None:
        """Return a client's arrays as one vector, read-only; None if there are none, or they were lost."""
        if client_id not in self._digests:
            return None
        if self.folder is None:
            return self._vectors[client_id]
        try:
            return self._read(client_id, self._slots[client_id], self._digests[client_id])[0]
        except _LostError as error:
            self._lose(client_id, str(error))
            return None

    # ---- what changes it -----------------------------------------------------------------------

    def put(self, client_id: str, arrays: NamedArrays, digest: bytes) -> None:
        """Replace what a client sent."""
        self._store(client_id, flatten(arrays), digest)

    def add(self, client_id: str, arrays: NamedArrays, digest: bytes) -> bool:
        """Add to what a client sent; return False, and do nothing, if that is not there."""
        before = self.vector(client_id)
        if before is None:
            return False
        after = flatten(arrays)
        after += before
        self._store(client_id, after, digest)
        return True

    def discard(self, client_id: str) -> None:
        """Forget a client that left, its file too."""
        self._forget(client_id)
        if self.folder is not None:
            try:
                self._path(client_id).unlink(missing_ok=True)
            except OSError as error:
                raise _unusable(self.folder, error) from error

    def open(self, client_id: str, digest: bytes) -> bool:
        """Restore the value with this digest from an earlier run's file; return whether it is there."""
        if self.folder is None:
            return self._digests.get(client_id) == digest
        reasons: dict[str, None] = {}
        for slot in (0, 1):
            try:
                vector, checksum = self._read(client_id, slot, digest)
                if self._checksum(digest, vector) != checksum:
                    raise _LostError("a wrong checksum")
            except _LostError as error:
                reasons[str(error)] = None
            else:
                self._digests[client_id], self._slots[client_id] = digest, slot
                return True
        self._lose(client_id, "; ".join(reasons))
        return False

    def keep(self) -> None:
        """Leave the current values untouched until the next call, however many updates follow.

        Call it after every checkpoint, or never: without any call a value survives one update, which is enough if
        there is a checkpoint after every round.
        """
        self._kept = dict(self._slots)

    # ---- files ---------------------------------------------------------------------------------

    def _forget(self, client_id: str) -> None:
        for known in (self._digests, self._vectors, self._slots, self._kept):
            known.pop(client_id, None)

    def _lose(self, client_id: str, reason: str) -> None:
        logger.warning("What client %r sent is lost (%s): it starts anew.", client_id, reason)
        self._forget(client_id)

    def _path(self, client_id: str) -> Path:
        """Return a client's file, named by a hash: an id may hold anything, and collisions cannot be found."""
        name = hashlib.blake2b(client_id.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()
        return (self.folder or Path()) / f"{name}.memory"

    def _store(self, client_id: str, vector: Vector, digest: bytes) -> None:
        if self.folder is None:
            self._vectors[client_id] = vector
        else:
            slot = 1 - self._kept.get(client_id, self._slots.get(client_id, 1))
            try:
                self._write(client_id, slot, vector, digest)
            except OSError as error:
                raise _unusable(self.folder, error) from error
            self._slots[client_id] = slot
        self._digests[client_id] = digest

    def _write(self, client_id: str, slot: int, vector: Vector, digest: bytes) -> None:
        header = _HEADER.pack(_MAGIC, self._schema, digest, self._checksum(digest, vector))
        # created if needed, and never emptied: the other slot may hold the value of the last checkpoint
        with open(self._path(client_id), "r+b", opener=_create) as file:
            file.truncate(2 * self._slot_bytes)
            file.seek(slot * self._slot_bytes)
            file.write(header)
            file.write(vector.astype("<f4", copy=False).data)
            file.flush()
            os.fsync(file.fileno())

    def _checksum(self, digest: bytes, vector: Vector) -> int:
        fields = _FIELDS.pack(_MAGIC, self._schema, digest)
        return zlib.crc32(vector.astype("<f4", copy=False).data, zlib.crc32(fields))

    def _read(self, client_id: str, slot: int, digest: bytes) -> tuple[Vector, int]:
        """Return a slot's values, still on disk, and its checksum, which is not checked.

        Raises
        ------
        _LostError
            If the slot does not hold a value with this digest.
        """
        size, start = 2 * self._slot_bytes, slot * self._slot_bytes
        try:
            with self._path(client_id).open("rb") as file:
                if (found := os.fstat(file.fileno()).st_size) != size:
                    raise _LostError(f"expected {size} bytes, got {found}")
                file.seek(start)
                magic, schema, history, checksum = _HEADER.unpack(file.read(_HEADER.size))
                if (magic, schema) != (_MAGIC, self._schema):
                    raise _LostError("no slot for these arrays")
                if history != digest:
                    raise _LostError("another history")
                values = np.memmap(file, "<f4", "r", start + _HEADER.size, (self.num_values,))
        except FileNotFoundError:
            raise _LostError("no file") from None
        except OSError as error:
            raise _unusable(self.folder or Path(), error) from error
        return np.asarray(values, np.float32), checksum


def _create(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_CREAT, 0o600)


def _unusable(folder: Path, error: OSError) -> StateError:
    return StateError(
        f"{folder}: what the clients sent cannot be remembered: expected a folder to write and read, "
        f"got {error.strerror or error}. Free some space, allow writing, or choose another folder."
    )
