"""Files that survive a crash.

An archive (named arrays in numpy's own format) and a JSON value are replaced atomically: they are there whole or
not at all. Lines of JSON are appended; an unfinished line is cut off when the file is reopened.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import ConfigError, StateError

logger = logging.getLogger(__name__)


def write_archive(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` as an ``.npz`` file; the former file stays until all of it is on disk.

    Raises
    ------
    StateError
        If the disk is full, or the folder cannot be written.
    """
    with _replacing(path) as file:
        np.savez(file, allow_pickle=False, **arrays)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value, indented to be readable; the former file stays until all of it is on disk.

    Raises
    ------
    StateError
        If the disk is full, or the folder cannot be written.
    """
    with _replacing(path) as file:
        file.write(f"{json.dumps(value, indent=2)}\n".encode())


def read_archive(path: Path) -> dict[str, NDArray[Any]] | None:
    """Return the arrays of a file that `write_archive` wrote; None if there is none.

    Raises
    ------
    StateError
        If the file is damaged, or cannot be read.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        return None
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        zipfile.BadZipFile,
    ) as error:
        raise StateError(f"cannot read {path} ({error}). Was it damaged?") from None


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]], *, anew: bool = False) -> int:
    """Append lines of JSON, or replace all with them; return the file's size in bytes. Raises StateError."""
    try:
        with path.open("w" if anew else "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StateError(f"cannot write {path} ({error}). Free the disk, or choose another folder.") from None


def put_line(path: Path, line: Mapping[str, Any], *, key: str) -> None:
    """Append a line of JSON; it replaces lines whose `key` is not below its own, and an incomplete last one.

    Raises
    ------
    StateError
        If the disk is full, or the folder cannot be written; the former lines are kept then.
    """
    # Lines ascend: the last one says whether this belongs behind it.
    if (last := _last_line(path)) is None or (last.endswith(b"\n") and json.loads(last)[key] < line[key]):
        append_lines(path, [line])
        return
    former = [old for old in read_lines(path) if old[key] < line[key]]
    with _replacing(path) as file:
        file.writelines(f"{json.dumps(each)}\n".encode() for each in (*former, line))


def _last_line(path: Path) -> bytes | None:
    """Return the last line of a file, None if it is empty."""
    with path.open("rb") as file:
        start = end = file.seek(0, os.SEEK_END)
        tail = b""
        while start and b"\n" not in tail[:-1]:
            start = max(0, start - max(2**12, end - start))
            file.seek(start)
            tail = file.read(end - start)
    return tail[:-1].rpartition(b"\n")[2] + tail[-1:] if tail else None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, except for an incomplete one at the end."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def take_up(path: Path, size: int) -> list[dict[str, Any]]:
    """Return the lines that a file had when its size was `size` bytes, and cut off what was appended later.

    Raises
    ------
    StateError
        If the file is shorter, or damaged.
    """
    try:
        if path.stat().st_size < size:
            raise ValueError(f"expected {size} bytes, got {path.stat().st_size}")
        os.truncate(path, size)
        return read_lines(path)
    except (OSError, ValueError) as error:
        raise StateError(f"cannot take up {path} ({error}).") from None


@contextmanager
def exclusive(path: Path, busy: str) -> Iterator[None]:
    """Hold a file, made if there is none, that no other process can hold; the lock ends with the process.

    Raises
    ------
    ConfigError
        With the text `busy`, if another process holds it.
    StateError
        If it cannot be opened.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.fdopen(os.open(path, os.O_RDONLY | os.O_CREAT, 0o666))
    except OSError as error:
        raise StateError(f"cannot open {path} ({error}). Choose another folder.") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(busy) from None
        except OSError as error:  # as on some network file systems
            logger.warning("cannot lock %s (%s): make sure that no other process uses it.", path, error)
        yield


@contextmanager
def _replacing(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file that replaces `path` once all of it is on disk. Raises StateError."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise StateError(f"cannot write {path} ({error}). Free the disk, or choose another folder.") from None


def _sync_folder(folder: Path) -> None:
    """Make a renaming survive a power failure."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
