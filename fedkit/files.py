"""Files that outlive a crash.

An archive, named arrays in numpy's own format, is replaced in one step: it is there whole or not at all. Lines of
JSON are appended; what was not finished is cut off when the file is taken up again.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedkit.errors import StateError


def write_archive(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Write `arrays` as an ``.npz`` file; until all of it is on the disk, the former file stays.

    Raises
    ------
    StateError
        If the disk is full, or the folder cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **arrays)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise StateError(f"cannot write {path} ({error}). Free the disk, or choose another folder.") from None


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
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise StateError(f"cannot read {path} ({error}). Was it damaged?") from None


def append_lines(path: Path, lines: Iterable[Mapping[str, Any]], *, anew: bool = False) -> int:
    """Append lines of JSON, or replace all by them; return the size of the file in bytes. Raises StateError."""
    try:
        with path.open("w" if anew else "a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            os.fsync(file.fileno())
            return os.fstat(file.fileno()).st_size
    except OSError as error:
        raise StateError(f"cannot write {path} ({error}). Free the disk, or choose another folder.") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, but for one at the end that is not whole."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines(keepends=True) if line.endswith("\n")]


def take_up(path: Path, size: int) -> list[dict[str, Any]]:
    """Return the lines that a file had when its size was `size` bytes, and cut off what came later.

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


def _sync_folder(folder: Path) -> None:
    """Make a renaming last through a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
