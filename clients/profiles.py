"""What a client's device can carry, and what that means for its training.

A node says it in its node config, ``profile="mobile"``, or it is found out: "gpu" where there is CUDA, else "cpu".

=========  ==========================================================================================
profile    what it means
=========  ==========================================================================================
"cpu"      float32, as torch has it
"gpu"      CUDA; bfloat16 where autocast has it, the frozen linear layers in it for good; batches are copied from
           pinned memory while the GPU computes
"mobile"   frozen linear layers in int8 (torchao), activations computed twice rather than kept, 4 examples at once,
           one thread, at most 700 MB resident
=========  ==========================================================================================

``threads``, ``memory-mb`` and ``micro-batch`` in the node config set what a profile has otherwise. More than its
memory a client does not take: it answers with an error that says so, before loading (`Profile.check_memory` with
the size of the weights) or at the step at which its process holds more.

The client says its profile, processors and memory when the strategy asks who it is. What that means for the rank,
the bits and the batch size, the strategy decides: `fedkit.strategies.Terms`.

Uploads are coded on the CPU in every profile. A LoRA update has up to some millions of entries; 10 million take
0.06 s at 1 bit, and the entropy coder, which is sequential, is part of that: there is nothing for a GPU to gain.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from flwr.app import Context

from fedkit.config import Scalar, as_type, check_keys
from fedkit.errors import ConfigError
from fedkit.message import PROFILE

from .resident import MB, check_budget, hold_less, total_bytes

if TYPE_CHECKING:
    from torch import Tensor, nn

M = TypeVar("M", bound="nn.Module")
SETTINGS: Final = {"threads": "threads", "micro-batch": "micro_batch", "memory-mb": "memory"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Profile:
    """What one device can carry.

    Raises
    ------
    ConfigError
        If a number is below 1.
    """

    name: str = "cpu"
    device: str = "cpu"
    bfloat16: bool = False  # where autocast has it; the trained parameters stay float32
    int8: bool = False
    checkpointing: bool = False
    micro_batch: int | None = None  # examples at once; a batch of more is gone through in pieces. None: all
    threads: int | None = None  # None: as torch has them
    memory: int | None = None  # bytes that the process may hold; None: no limit

    def __post_init__(self) -> None:
        for key in ("micro_batch", "threads", "memory"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ConfigError(f"profile: expected {key} of at least 1, got {value}.")

    @classmethod
    def of(cls, context: Context) -> Profile:
        """Return the profile of this node, with what its config sets; raises ConfigError for an unknown name."""
        config = context.node_config
        profile = PROFILES[profile_name(context)]
        for key, field in SETTINGS.items():
            if key in config:
                value = int(as_type(key, config[key], int))
                changed: dict[str, Any] = {field: value * MB if key == "memory-mb" else value}
                profile = replace(profile, **changed)
        return profile

    def prepare(self, model: M) -> M:
        """Return the model, changed in place, as this device trains it: frozen layers, checkpointing, device.

        Raises
        ------
        MemoryBudgetError
            If it does not fit.
        ConfigError
            If torchao, or CUDA, is needed and missing.
        """
        import torch

        from .frozen_base import cast_base, checkpoint_activations, quantize_base

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("profile 'gpu': torch finds no CUDA. Set profile='cpu' in the node config.")
        self.limit_threads()
        if self.memory is not None:
            hold_less()
        self.check_memory()
        if self.int8:
            quantize_base(model, self.check_memory)
        if self.bfloat16:
            cast_base(model, torch.bfloat16)
        if self.checkpointing:
            checkpoint_activations(model)
        if self.memory is not None:
            hold_less()
        self.check_memory()
        return model.to(self.device)

    def limit_threads(self) -> None:
        """Use as many threads as the profile says; call it before the first tensor, where threads are few."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def check_memory(self, needed: int = 0) -> None:
        """Check that the process may hold `needed` bytes more; raises MemoryBudgetError."""
        check_budget(self.memory, needed)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context in which the model is called."""
        import torch

        return torch.autocast(self.device, torch.bfloat16) if self.bfloat16 else nullcontext()

    def pieces(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Yield the batch on the device, in pieces that it can carry, each with its share of the examples.

        The gradient of the mean loss over a batch is that of the pieces' mean losses, weighted by these shares.
        """
        size = len(next(iter(batch.values())))
        step = self.micro_batch or size
        for begin in range(0, size, step):
            piece = {name: value[begin : begin + step] for name, value in batch.items()} if step < size else batch
            share = min(step, size - begin) / size
            yield share, {name: self._moved(value) for name, value in piece.items()}

    def _moved(self, value: Tensor) -> Tensor:
        if self.device == "cpu" or value.device.type != "cpu":
            return value.to(self.device)
        return value.pin_memory().to(self.device, non_blocking=True)


PROFILES: Final[Mapping[str, Profile]] = {
    "cpu": Profile(),
    "gpu": Profile(name="gpu", device="cuda", bfloat16=True),
    "mobile": Profile(name="mobile", int8=True, checkpointing=True, micro_batch=4, threads=1, memory=700 * MB),
}


def profile_name(context: Context) -> str:
    """Return the profile that the node config names, or the one that is found; raises ConfigError."""
    name = context.node_config.get(PROFILE)
    if name is None:
        return "gpu" if _has_cuda() else "cpu"
    check_keys([str(name)], PROFILES, what="profile")
    return str(name)


def described(context: Context) -> dict[str, Scalar]:
    """Return what a client says of its device when it is asked who it is; without importing torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    budget = Profile.of(context).memory
    memory = min(total_bytes(), budget) if budget else total_bytes()
    return {PROFILE: profile_name(context), "cores": cores, "memory-mb": memory // MB}


def _has_cuda() -> bool:
    """Return whether there are a driver, a torch for it, and leave to use it; to ask torch would take seconds."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")
    if not (allowed and Path("/proc/driver/nvidia/version").exists()):
        return False
    try:
        return "+cpu" not in version("torch")
    except PackageNotFoundError:
        return False
