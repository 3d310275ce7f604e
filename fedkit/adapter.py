"""A PEFT adapter without torch: a server can start from one, and save it, without having the model.

The server asks a client for the adapter, since the clients have the model. It saves the adapter in PEFT's format:
``PeftModel.from_pretrained(base_model, folder)`` reads it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, RecordDict

from fedkit.arrays import NamedArrays, check_finite
from fedkit.errors import QuorumError, ReplyError
from fedkit.message import SERVER_ROUND, from_arrays, records_of, to_arrays
from fedkit.rounds import RoundGrid

logger = logging.getLogger(__name__)

_ARRAYS, _ABOUT, _CONFIG = "arrays", "adapter", "config"
WEIGHTS_NAME, CONFIG_NAME = "adapter_model.safetensors", "adapter_config.json"  # PEFT's
NODE_SECONDS: Final = 600.0  # how long to wait for the first node


@dataclass(frozen=True)
class Adapter:
    """An adapter as `fedkit.clients.adapters.describe` returns it."""

    arrays: NamedArrays  # by PEFT's names
    config: str  # the text of PEFT's adapter_config.json

    def reply(self, message: Message) -> Message:
        """Return the reply to a server that asks for the adapter."""
        about = ConfigRecord({_CONFIG: self.config})
        return Message(RecordDict({_ARRAYS: from_arrays(self.arrays), _ABOUT: about}), reply_to=message)

    @classmethod
    def read(cls, reply: Message) -> Self:
        """Return the adapter in a client's reply; raises ReplyError if there is none."""
        if reply.has_error():
            raise ReplyError(f"it answered with an error: {reply.error.reason}")
        about = reply.content.get(_ABOUT)
        if not isinstance(about, ConfigRecord) or len(arrays := records_of(reply.content, ArrayRecord)) != 1:
            raise ReplyError(f"expected an adapter, got the records {sorted(reply.content)}.")
        try:
            found = to_arrays(arrays[0])
            check_finite(found)
            return cls(found, str(about[_CONFIG]))
        except (KeyError, TypeError, ValueError) as error:
            raise ReplyError(f"its adapter cannot be read: {error!r}.") from None

    def save(self, folder: Path, arrays: NamedArrays) -> None:
        """Save `arrays`, which have this adapter's names and shapes, in PEFT's format."""
        from safetensors.numpy import save_file  # imported here: only a run that ends well needs it

        folder.mkdir(parents=True, exist_ok=True)
        plain = {name: np.ascontiguousarray(arrays[name]) for name in self.arrays}
        save_file(plain, folder / WEIGHTS_NAME, metadata={"format": "pt"})
        (folder / WEIGHTS_NAME).chmod(0o644)  # 0600 otherwise; the folder says who may read it
        (folder / CONFIG_NAME).write_text(self.config, encoding="utf-8")


def ask_for_adapter(grid: RoundGrid, *, node_timeout: float = NODE_SECONDS, timeout: float = 3600.0) -> Adapter:
    """Return the initial adapter of a client; the clients are asked one by one until one answers.

    A client answers in its `@app.query()`; see `Adapter.reply`.

    Parameters
    ----------
    grid : RoundGrid
        The grid that reaches the clients.
    node_timeout : float
        Seconds to wait for the first node.
    timeout : float
        Seconds to wait for an answer, unless the grid's limits have a deadline.

    Raises
    ------
    QuorumError
        If there is no node, or none that answers with an adapter.
    """
    asked: set[int] = set()
    deadline = grid.clock.monotonic() + node_timeout
    while True:
        left = [node_id for node_id in grid.get_node_ids() if node_id not in asked]
        if not left and (asked or grid.clock.monotonic() > deadline):
            raise QuorumError(f"no adapter to begin with: {len(asked)} nodes were asked for theirs. See the log.")
        if not left:
            grid.clock.sleep(1.0)
            continue
        asked.add(left[0])
        content = RecordDict({_CONFIG: ConfigRecord({SERVER_ROUND: 0})})
        question = Message(content, dst_node_id=left[0], message_type=MessageType.QUERY, ttl=timeout)
        for reply in grid.ask([question], timeout=timeout):
            try:
                return Adapter.read(reply)
            except ReplyError as error:
                logger.warning("node %d: no adapter: %s", left[0], error)
