"""The client half of SAFARI: each client has a sparsity mask of fixed density that moves from round to round.

After local training the client sends the kept entries of its update together with the mask. Then it rewires the
mask: kept entries of least magnitude are dropped, and the others that training moved most take their place (prune
and regrow, as in RigL and FedSpa). The mask stays on the client, which draws a new one if it was lost.

Deviations from the paper
-------------------------
The paper masks every gradient. Here the app trains as usual, with any framework: entries outside the mask are
trained, too, and then left out. So the entries to regrow are chosen by their update, not by their gradient. With
`sparse_model`, as published, training starts from the model under the mask, and the smallest *weights* are
dropped. Without it, the default, training starts from the whole model, and the smallest *updates* are dropped.
Under a row mask (`fedkit.row_masks`) a client sends, and moves, only those kept entries that are in active rows.

Not from the paper: masks that are drawn anew for each upload (`fedkit.codec.sparsify.DrawnMask`). Only a seed is
sent, and neither side remembers the mask.
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

MASK_KEY: Final = "safari.mask"  # key in the state; the value is what the mask belongs to, then its bits


class SafariMod(UpdateMod):
    """Turns the reply into a sparse update. The server needs `fedkit.strategies.Safari`."""

    scheme: ClassVar[str] = "safari"

    def rewinds(self, instructions: Instructions) -> bool:
        """Return True unless masks are drawn: the mask moves even if the upload is lost."""
        return not instructions.options["drawn"]

    def prepare(self, job: Job) -> NamedArrays:
        """Return the arrays that were sent, under the mask if models are sparse."""
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
        else:  # in inactive rows the mask stays: they were not trained
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
    """Return this client's mask, or a new random one if it has none for these arrays and this density."""
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
    """Return what a mask belongs to, as bytes: the names and shapes of the arrays, and the density."""
    return schema_digest(like) + struct.pack("<d", float(job.instructions.options["density"]))
