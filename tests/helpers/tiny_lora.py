"""A small PEFT model with a head, and batches for it."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from fedkit.clients.rm_lora import RMLoraConfig, lora_pairs

R = 4


class TinyNet(nn.Module):
    """Two layers with a loss, the way transformers return it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(6, 8)
        self.middle = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor, labels: Tensor) -> SimpleNamespace:
        """Return the cross-entropy as `.loss`."""
        logits = self.head(self.dropout(self.middle(self.hidden(x).relu()).relu()))
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels))


def tiny_model(*, b_is_zero: bool = True) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(
        TinyNet(), LoraConfig(r=R, target_modules=["hidden", "middle"], modules_to_save=["head"])
    )
    if not b_is_zero:
        for _, _, b in lora_pairs(model):
            nn.init.normal_(b)
    return model


def tiny_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 6, generator=generator)
    labels = torch.randint(0, 3, (24,), generator=generator)
    return [{"x": x[i : i + 8], "labels": labels[i : i + 8]} for i in range(0, 24, 8)]


def rm_config(**changes: object) -> RMLoraConfig:
    values = {"r": R, "lora_alpha": 8, "active_rank": 2, "target_modules": ("hidden", "middle")}
    return RMLoraConfig(**(values | changes))  # type: ignore[arg-type]


def kept(grad: Tensor) -> list[int]:
    """Return the indices along dimension 0 that hold any gradient."""
    return grad.flatten(1).any(1).nonzero().flatten().tolist()
