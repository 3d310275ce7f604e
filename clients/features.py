"""Features: what the head of a model is given of a slot's examples while the slot is trained.

Their mean says which texts or images the slot's task is about. `Tac` asks each client for it once, and clusters
slots by it where that tells them apart; by their adapters else, and if an app does not say it:
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
    """The mean features of each slot, if the server asks for them; else it does nothing.

    Parameters
    ----------
    message : Message
        What the app was sent.
    """

    def __init__(self, message: Message) -> None:
        scheme = read_scheme(message)
        self.asked = scheme is not None and bool(read_instructions(message).options.get(FEATURES))
        self._means: list[Any] = []

    @classmethod
    def at_random(cls, message: Message, num_slots: int, rng: np.random.Generator) -> Self:
        """Return features of as many slots that say nothing: what a rehearsal sends."""
        features = cls(message)
        features._means = list(rng.standard_normal((num_slots, MOST), np.float32))
        return features

    @contextmanager
    def watching(self, model: PeftModel) -> Iterator[None]:
        """Average what the head is given until the end of the block, as one slot's.

        Without a head among PEFT's ``modules_to_save``, what the first layer with LoRA is given; of texts the
        mean over tokens, too. The adapter has hardly moved in the first round of a client, so it is what the
        frozen model makes of its examples.
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
        """Put them into the app's reply, where `TacMod` finds them."""
        if self.asked:
            content[FEATURES] = ConfigRecord({"means": features_to_text(np.stack(self._means))})


def _by_example(given: Tensor) -> Tensor:
    """Return a row for each example: the mean over the tokens of texts, or the pixels of images."""
    if given.ndim == 4:
        return given.flatten(2).mean(2)
    return given.flatten(1, -2).mean(1) if given.ndim > 2 else given


def _watched(model: PeftModel) -> nn.Module:
    """Return the module whose input is averaged: not an embedding, which is given numbers of tokens."""
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
