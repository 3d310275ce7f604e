"""The slots of a PEFT model: for one task after the other its adapter is loaded, trained, and taken out again.

The model holds one adapter at a time, whatever the number of tasks, as do the optimizer and the gradients: what a
phone needs for five tasks is what it needs for one, and 4 bytes for each value of the other adapters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from fedkit.aggregation.slots import join_slots, split_slots
from fedkit.arrays import NamedArrays

from .adapters import get_adapter, set_adapter
from .features import Features

if TYPE_CHECKING:
    from peft import PeftModel

T = TypeVar("T")


def train_slots(
    model: PeftModel,
    received: NamedArrays,
    trainings: Sequence[Callable[[PeftModel], T]],
    features: Features | None = None,
) -> tuple[dict[str, NDArray[np.float32]], list[T]]:
    """Return the trained adapters of all slots as one message has them, and what each training returned.

    Parameters
    ----------
    model : PeftModel
        Its active adapter is written over; in the end it is that of the last slot.
    received : NamedArrays
        The adapters to start from, as `TacMod` hands them to the app.
    trainings : sequence of callables
        One for each slot, always in the same order: trains the active adapter of the model in place.
    features : Features, optional
        Takes note of what the model makes of each slot's examples, for a server that tells slots apart so.

    Raises
    ------
    SchemaMismatchError
        For adapters that are none of this model.
    """
    starts, trained, results = split_slots(received, len(trainings)), [], []
    for start, training in zip(starts, trainings, strict=True):
        set_adapter(model, start)
        with features.watching(model) if features else nullcontext():
            results.append(training(model))
        model.zero_grad(set_to_none=True)
        trained.append(get_adapter(model))
    return join_slots(trained), results
