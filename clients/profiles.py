"""Device profiles: what a client's device can carry, and how it trains because of that.

The node config sets the profile, ``profile="mobile"``; otherwise it is "gpu" where CUDA is found, else "cpu".

=========  ==========================================================================================
profile    what it means
=========  ==========================================================================================
"cpu"      float32, with torch's own settings
"gpu"      CUDA; bfloat16 where autocast uses it, and permanently in the frozen linear layers; batches are copied
           from pinned memory while the GPU computes
"mobile"   frozen linear layers in int8 (torchao), activations recomputed instead of stored, 4 examples at once,
           one thread, at most 700 MB resident
=========  ==========================================================================================

``threads``, ``memory-mb`` and ``micro-batch`` in the node config override the values of the profile. A client does
not use more memory than its limit: it answers with an error that says so, either before loading
(`Profile.check_memory` with the size of the weights) or at the step before which its process holds more.

A client reports its profile, processors and memory when the strategy asks which client it is. The strategy decides
what the profile means for rank, bits and batch size: `fedkit.strategies.Terms`.

Uploads are encoded on the CPU in every profile. A LoRA update has up to some millions of entries; 10 million take
0.06 s at 1 bit, part of it in the entropy coder, which is sequential: a GPU would gain nothing.
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
    """What one device can carry: where, how and with how much memory it trains.

    Raises
    ------
    ConfigError
        If a number is below 1.
    """

    name: str = "cpu"
    device: str = "cpu"
    bfloat16: bool = False  # where autocast uses it; the trained parameters stay float32
    int8: bool = False
    checkpointing: bool = False
    micro_batch: int | None = None  # examples at once; larger batches are processed in pieces. None: all
    threads: int | None = None  # None: torch's own setting
    memory: int | None = None  # bytes that the process may hold; None: no limit

    def __post_init__(self) -> None:
        for key in ("micro_batch", "threads", "memory"):
            if (value := getattr(self, key)) is not None and value < 1:
                raise ConfigError(f"profile: expected {key} of at least 1, got {value}.")

    @classmethod
    def of(cls, context: Context) -> Profile:
        """Return the profile of this node, with its config's settings; raises ConfigError for an unknown name."""
        config = context.node_config
        profile = PROFILES[profile_name(context)]
        for key, field in SETTINGS.items():
            if key in config:
                value = int(as_type(key, config[key], int))
                changed: dict[str, Any] = {field: value * MB if key == "memory-mb" else value}
                profile = replace(profile, **changed)
        return profile

    def prepare(self, model: M) -> M:
        """Return the model, prepared in place for this device: frozen layers, checkpointing, `device`.

        Raises
        ------
        MemoryBudgetError
            If the process holds more memory than the profile allows.
        ConfigError
            If torchao or CUDA is needed but missing.
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
        """Set the profile's number of threads; if it is small, call this before creating the first tensor."""
        import torch

        if self.threads is not None:
            torch.set_num_threads(self.threads)

    def check_memory(self, needed: int = 0) -> None:
        """Check that the process may hold `needed` bytes more; raises MemoryBudgetError."""
        check_budget(self.memory, needed)

    def autocast(self) -> AbstractContextManager[object]:
        """Return the context manager in which to call the model."""
        import torch

        return torch.autocast(self.device, torch.bfloat16) if self.bfloat16 else nullcontext()

    def pieces(self, batch: Mapping[str, Tensor]) -> Iterator[tuple[float, dict[str, Tensor]]]:
        """Yield the batch, moved to the device, in pieces of `micro_batch`, each with its share of the examples.

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
    """Return the profile that the node config names, or the detected one; raises ConfigError if it is unknown."""
    name = context.node_config.get(PROFILE)
    if name is None:
        return "gpu" if _has_cuda() else "cpu"
    check_keys([str(name)], PROFILES, what="profile")
    return str(name)


def described(context: Context) -> dict[str, Scalar]:
    """Return what a client reports about its device when asked which client it is; does not import torch."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    budget = Profile.of(context).memory
    memory = min(total_bytes(), budget) if budget else total_bytes()
    return {PROFILE: profile_name(context), "cores": cores, "memory-mb": memory // MB}


def _has_cuda() -> bool:
    """Return whether a driver, a torch build for it, and permission are there; asking torch would take seconds."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES", "all") not in ("", "-1")
    if not (allowed and Path("/proc/driver/nvidia/version").exists()):
        return False
    try:
        return "+cpu" not in version("torch")
    except PackageNotFoundError:
        return False
