"""Which LoRA factors a client does not share, by the server's option ``lora``: `fedkit.strategies.parts`.

With "fedsa" each client has its own lora_B. The server sends an empty one; the app gets the lora_B that its last
training returned, or zeros at first; and lora_B is left out of the update. With "ffa" the app must return lora_A
unchanged, and lora_A is left out of the update.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Final

import numpy as np

from fedkit.arrays import NamedArrays
from fedkit.codec.snapshot import decode_snapshot, encode_snapshot
from fedkit.errors import CodecError, FedkitError
from fedkit.row_masks import RowDraw
from fedkit.submodels import is_factor, take

_OWN: Final = "own"  # in the state, after the scheme's name: the lora_B of this client


def completed(sent: NamedArrays, lora: str, state: MutableMapping[str, bytes], scheme: str) -> NamedArrays:
    """Return the arrays for the app: those that were sent, with this client's own lora_B under "fedsa"."""
    if lora != "fedsa":
        return sent
    own, arrays = _load(state, scheme), dict(sent)
    for name in (name for name in sent if is_factor(name, "lora_B")):
        r = len(sent[_other(name)])
        shape = (len(sent[name]), r, *sent[name].shape[2:])
        kept = own.get(name)
        arrays[name] = kept if kept is not None and kept.shape == shape else np.zeros(shape, np.float32)
    return arrays


def shared(local: NamedArrays, given: NamedArrays, lora: str) -> tuple[NamedArrays, NamedArrays]:
    """Return the arrays that the server averages, from the app's arrays and from those that it was given.

    Raises
    ------
    FedkitError
        If the app trained a lora_A under "ffa".
    """
    if lora not in ("ffa", "fedsa"):
        return local, given
    kept = "lora_A" if lora == "ffa" else "lora_B"
    names = [name for name in local if not is_factor(name, kept)]
    if lora == "ffa":
        for name in (name for name in local if name not in names):
            if not np.array_equal(local[name], given[name]):
                raise FedkitError(
                    f"array {name!r} was trained, which lora='ffa' forbids. Freeze it: freeze_lora_a."
                )
    return {name: local[name] for name in names}, {name: given[name] for name in names}


def check_rested(update: NamedArrays, rows: RowDraw | None) -> None:
    """Check that rows which are not sent were not trained; raises FedkitError if they were."""
    if rows is None:
        return
    sent = take(update, rows.submodel(update))
    for name, array in update.items():
        if np.count_nonzero(array) != np.count_nonzero(sent[name]):
            raise FedkitError(
                f"array {name!r} was trained in components that rest in this round, which would be lost. "
                "Train with rows=fedkit.message.rows_of(message), and keep the adapter in float32."
            )


def keep(local: NamedArrays, lora: str, state: MutableMapping[str, bytes], scheme: str) -> None:
    """Remember this client's own lora_B, under "fedsa"."""
    if lora == "fedsa":
        own = {name: array for name, array in local.items() if is_factor(name, "lora_B")}
        state[f"{scheme}.{_OWN}"] = encode_snapshot(own)


def _load(state: MutableMapping[str, bytes], scheme: str) -> NamedArrays:
    try:
        return decode_snapshot(state[f"{scheme}.{_OWN}"])
    except (KeyError, CodecError):
        return {}


def _other(name: str) -> str:
    return ".".join("lora_A" if part == "lora_B" else part for part in name.split("."))
