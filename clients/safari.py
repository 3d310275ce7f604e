"""The client half of SAFARI: a mask of its own, at a fixed density, that moves from round to round.

After local training the client sends the kept entries of its update, with the mask; then it rewires the mask:
the kept entries of least magnitude go, others that training moved most come (prune and regrow, as RigL and
FedSpa do). The mask stays on the client; a client that lost it draws a new one.

Deviations from the paper
-------------------------
The app is trained as it is, whatever its framework: entries outside the mask train along, and are then left
out, where the paper masks every gradient. So what regrows is judged by the update, not by the gradient.
With `sparse_model`, as published, training starts from the model under the mask and the least *weights* go;
without, the default, it starts from the whole model and the least *updates* go. Under a row mask
(`fedkit.row_masks`) a client sends those of its entries that are in active rows, and moves only them.

Not from the paper: masks that are drawn anew for each upload (`fedkit.codec.sparsify.DrawnMask`), of which only a
seed travels, and that nobody remembers.
"""

from __future__ import annotations

import struct
import zlib
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from fedkit.arrays import Mask, NamedArrays, add, flatten_mask, num_values, schema_digest, unflatten
from fedkit.codec.packing import pack_mask, unpack_mask
from fedkit.codec.sparsify import DrawnMask, density, prune_and_regrow, random_mask
from fedkit.message import Instructions

from .base import Coded, Job, UpdateMod

MASK_KEY: Final = "safari.mask"  # in the state: what the mask belongs to, then its bits


class SafariMod(UpdateMod):
    """Turns the reply into a sparse update. The server needs `fedkit.strategies.Safari`."""

    scheme: ClassVar[str] = "safari"

    def rewinds(self, instructions: Instructions) -> bool:
        """Return that they do: the mask moves, whatever becomes of the upload."""
        return not instructions.options["drawn"]

    def prepare(self, job: Job) -> NamedArrays:
        """Return what was sent, under the mask if models are sparse."""
        if not job.instructions.options["sparse-model"]:
            return job.sent
        mask = load_mask(job, like=job.sent)
        return {name: array * mask[name] for name, array in job.sent.items()}

    def code(self, update: NamedArrays, job: Job) -> Coded:
        """Return the kept entries of the update, and rewire the mask for the next round."""
        if job.instructions.options["drawn"]:
            return self._code_drawn(job.travelling(update), job)
        mask, options = load_mask(job, like=update), job.instructions.options
        magnitude = add(self.prepare(job), update) if options["sparse-model"] else update
        travelling, rate = job.travelling(update), float(options["rewire"])
        if job.rows is None:
            sent = mask
            save_mask(job, prune_and_regrow(mask, magnitude, update, rate))
        else:  # rows that rest keep theirs: nothing was learned of them
            active = job.rows.submodel(update)
            sent = active.take_mask(mask)
            moved = prune_and_regrow(sent, travelling, travelling, rate)
            changed = active.embed_mask({name: sent[name] ^ moved[name] for name in sent}, like=mask)
            save_mask(job, {name: mask[name] ^ changed[name] for name in mask})
        codec = job.instructions.codec
        return Coded(codec.encode(travelling, mask=None if density(mask) == 1 else sent, rng=job.rng))

    @staticmethod
    def _code_drawn(update: NamedArrays, job: Job) -> Coded:
        share = float(job.instructions.options["density"])
        mask = None if share == 1 else DrawnMask(int(job.rng.integers(2**63)), share)
        return Coded(job.instructions.codec.encode(update, mask=mask, rng=job.rng))


def load_mask(job: Job, *, like: NamedArrays) -> dict[str, NDArray[np.bool_]]:
    """Return this client's mask; a new random one if it has none for these arrays at this density."""
    wanted, options = float(job.instructions.options["density"]), job.instructions.options
    kept, key = job.state.get(MASK_KEY, b""), _key(job, like)
    if kept.startswith(key):
        return unflatten(unpack_mask(kept[len(key) :], num_values(like)), like=like)
    rng = np.random.default_rng([int(options["seed"]), zlib.crc32(job.client_id.encode())])
    return random_mask(like, wanted, rng)


def save_mask(job: Job, mask: Mask) -> None:
    """Remember the mask in the client's state."""
    job.state[MASK_KEY] = _key(job, mask) + pack_mask(flatten_mask(mask))


def _key(job: Job, like: NamedArrays | Mask) -> bytes:
    """Return what a mask belongs to: arrays, and a density."""
    return schema_digest(like) + struct.pack("<d", float(job.instructions.options["density"]))
