"""Examples of one task: what the model is given, and what it should answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Examples:
    """Arrays of the model's input by name, an example per row, and labels, head after head."""

    inputs: dict[str, NDArray[Any]]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def shifted(self, by: int) -> Examples:
        """Return these with larger labels."""
        return Examples(self.inputs, self.labels + by)

    def batch(
        self, rows: NDArray[np.int64] | slice, device: torch.device | str = "cpu"
    ) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Return some rows as the model takes them, on its device."""
        import torch

        inputs = {name: torch.from_numpy(array[rows]).to(device) for name, array in self.inputs.items()}
        return inputs, torch.from_numpy(self.labels[rows]).to(device)


def device() -> str:
    """Return what models and texts are computed on: CUDA where there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def together(parts: Sequence[Examples]) -> Examples:
    """Return the examples of several tasks as those of one."""
    inputs = {name: np.concatenate([part.inputs[name] for part in parts]) for name in parts[0].inputs}
    return Examples(inputs, np.concatenate([part.labels for part in parts]))
