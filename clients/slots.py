"""Training the slots of a client in one PEFT model: each task's adapter in turn is loaded, trained and taken out.

Whatever the number of tasks, the model holds one adapter at a time, and optimizer and gradients are for one, too.
So a phone needs for five tasks what it needs for one, plus 4 bytes for each value of the other adapters.
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
    """Return the trained adapters of all slots, joined for one message, and the result of each training.

    Parameters
    ----------
    model : PeftModel
        Its active adapter is overwritten; in the end it is that of the last slot.
    received : NamedArrays
        The adapters to start from, as `TacMod` passes them to the app.
    trainings : sequence of callables
        One for each slot, in the same order in every round. Each trains the model's active adapter in place.
    features : Features, optional
        Records the features of each slot's examples, for a server that clusters slots by them.

    Raises
    ------
    SchemaMismatchError
        For adapters that do not fit this model.
    """
    starts, trained, results = split_slots(received, len(trainings)), [], []
    for start, training in zip(starts, trainings, strict=True):
        set_adapter(model, start)
        with features.watching(model) if features else nullcontext():
            results.append(training(model))
        model.zero_grad(set_to_none=True)
        trained.append(get_adapter(model))
    return join_slots(trained), results
