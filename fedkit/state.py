"""Where a client's memory is kept: on its disk, or else in Flower's Context, which ends with the SuperNode.

A client that has a folder for its state, the node config's ``state-dir`` or the environment's `FEDKIT_STATE_DIR`,
keeps one file per experiment there. An experiment is a run with all its resumptions: the server makes its id,
keeps it in its checkpoint, and sends it in every message. Flower's run id and node ids, which change when a run is
resumed or a SuperNode restarts, are not part of the file's name. A client keeps the files of its newest
experiments: `KEPT`, and the present one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
from flwr.app import ConfigRecord, Context

from fedkit.errors import StateError
from fedkit.files import read_archive, write_archive
from fedkit.message import client_id

logger = logging.getLogger(__name__)

State: TypeAlias = dict[str, bytes]
"""What a client remembers, by name; only one module writes each name."""

STATE_DIR: Final = "FEDKIT_STATE_DIR"
KEPT: Final = 8  # former experiments of which a client's file stays
_RECORD, _EXPERIMENT = "fedkit", "experiment"


class ClientState:
    """The state of one client in one experiment: `load` it, change it, `save` it before the reply leaves."""

    def __init__(self, context: Context, experiment: str) -> None:
        self._context, self._experiment = context, experiment
        folder = str(context.node_config.get("state-dir", "")) or os.environ.get(STATE_DIR, "")
        self.path = Path(folder, _safe(experiment), f"{_safe(client_id(context))}.npz") if folder else None

    def load(self) -> State:
        """Return what is remembered; empty if it cannot be read."""
        if self.path is None:
            record = self._context.state.get(_RECORD)
            if not isinstance(record, ConfigRecord) or record.get(_EXPERIMENT) != self._experiment:
                return {}
            return {key: value for key, value in record.items() if isinstance(value, bytes)}
        try:
            return {name: array.tobytes() for name, array in (read_archive(self.path) or {}).items()}
        except StateError as error:
            logger.warning("%s Starting anew.", error)
            return {}

    def save(self, state: State) -> None:
        """Save all of `state`.

        Raises
        ------
        StateError
            If the disk is full, or the folder cannot be written.
        """
        if self.path is None:
            self._context.state[_RECORD] = ConfigRecord({_EXPERIMENT: self._experiment, **state})
        else:
            if not self.path.exists():
                self._forget()
            write_archive(self.path, {name: np.frombuffer(data, np.uint8) for name, data in state.items()})

    def _forget(self) -> None:
        """Remove this client's files of all but the newest `KEPT` former experiments."""
        assert self.path is not None
        with suppress(OSError):  # another process may be at it
            former = sorted(self.path.parent.parent.glob(f"*/{self.path.name}"), key=lambda p: p.stat().st_mtime)
            for old in former[:-KEPT]:
                old.unlink()
                with suppress(OSError):
                    old.parent.rmdir()  # if nothing else is in it


def _safe(name: str) -> str:
    """Return a file name for any text, a different one for each."""
    if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        return name
    return "~" + hashlib.blake2b(name.encode(), digest_size=16).hexdigest()
