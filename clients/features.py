"""Features: the input of a model's head for the examples of a slot, averaged while the slot is trained.

This mean tells which texts or images the slot's task is about. `Tac` asks each client for it once, and clusters
slots by it where that tells them apart. Otherwise, and if an app does not send features, it clusters the adapters:
`fedkit.aggregation.evidence`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from flwr.app import ConfigRecord, Message, RecordDict

from fedkit.aggregation.evidence import FEATURES, MOST, features_to_text
from fedkit.errors import ConfigError
from fedkit.message import read_instructions, read_scheme

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn


class Features:
    """Collects the mean features of each slot if the server asks for them, and does nothing otherwise.

    Parameters
    ----------
    message : Message
        The message that the app received.
    """

    def __init__(self, message: Message) -> None:
        scheme = read_scheme(message)
        self.asked = scheme is not None and bool(read_instructions(message).options.get(FEATURES))
        self._means: list[Any] = []

    @classmethod
    def at_random(cls, message: Message, num_slots: int, rng: np.random.Generator) -> Self:
        """Return random features for `num_slots` slots, as a rehearsal sends them."""
        features = cls(message)
        features._means = list(rng.standard_normal((num_slots, MOST), np.float32))
        return features

    @contextmanager
    def watching(self, model: PeftModel) -> Iterator[None]:
        """Average the inputs of the head until the end of the block; the mean is the features of one slot.

        Without a head among PEFT's ``modules_to_save``, the inputs of the first layer with LoRA are used. For
        texts the mean is also over tokens. In a client's first round the adapter has hardly changed yet, so the
        features are nearly those of the frozen model.
        """
        if not self.asked:
            yield
            return
        sums: list[Tensor] = []
        examples = 0

        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nonlocal examples
            given = (args[0] if args else next(iter(kwargs.values()))).detach().float()
            each = _by_example(given)
            sums[:] = [each.sum(0) + (sums[0] if sums else 0)]
            examples += len(each)

        handle = _watched(model).register_forward_pre_hook(note, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()
        if not sums:
            raise ConfigError("features: the slot was trained without a pass through the model.")
        self._means.append((sums[0] / examples).cpu().numpy())

    def write(self, content: RecordDict) -> None:
        """Write the features into the content of the app's reply, where `TacMod` finds them."""
        if self.asked:
            content[FEATURES] = ConfigRecord({"means": features_to_text(np.stack(self._means))})


def _by_example(given: Tensor) -> Tensor:
    """Return one row per example: the mean over the tokens of a text, or over the pixels of an image."""
    if given.ndim == 4:
        return given.flatten(2).mean(2)
    return given.flatten(1, -2).mean(1) if given.ndim > 2 else given


def _watched(model: PeftModel) -> nn.Module:
    """Return the module whose input is averaged; not an embedding, whose input is token ids."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper
    from torch.nn import Embedding

    heads = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)]
    layers = [
        module
        for module in model.modules()
        if isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), Embedding)
    ]
    if not heads and not layers:
        raise ConfigError("features: the model has neither a head that is trained nor a layer with LoRA.")
    return heads[-1] if heads else layers[0]
