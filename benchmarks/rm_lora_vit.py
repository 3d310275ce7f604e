"""A small vision transformer, pre-trained on half of CIFAR-100: ``python -m benchmarks.rm_lora_vit``.

No pre-trained weights are at hand, so the benchmark trains its own: on 50 of the classes, with 100 images each,
flips and crops. Three convolutions turn an image into 16 tokens, so that two cores need no more than a quarter of
an hour; 2.9 million parameters. It is weak, and reports how weak: its accuracy on the test images of those
classes.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional

WIDTH, HEADS, LAYERS = 192, 3, 6
CLASSES, EPOCHS, BATCH, RATE, SIDE = 50, 40, 64, 1e-3, 32
MEAN, DEVIATION = (0.507, 0.487, 0.441), (0.267, 0.256, 0.276)


class Images(NamedTuple):
    """Images as float tensors of shape (images, 3, 32, 32), and labels from 0."""

    pixels: Tensor
    labels: Tensor


class Block(nn.Module):
    """Attention and a network of two layers, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.between = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return tokens of the same shape, (images, tokens, width)."""
        normed = self.before(x)
        heads = [f(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        x = x + self.out(functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.between(x))))


class VisionTransformer(nn.Module):
    """Convolutions, blocks, the mean of the tokens, a head."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        widths = (3, WIDTH // 4, WIDTH // 2, WIDTH)
        stem: list[nn.Module] = []
        for i, o in pairwise(widths):
            stem += [nn.Conv2d(i, o, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(o), nn.GELU()]
        self.stem = nn.Sequential(*stem[:-1])
        self.positions = nn.Parameter(0.02 * torch.randn((SIDE // 8) ** 2, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, num_classes)

    def tokens(self, pixels: Tensor) -> Tensor:
        """Return what the first block takes."""
        tokens: Tensor = self.stem(pixels).flatten(2).mT + self.positions
        return tokens

    def forward(self, pixels: Tensor) -> Tensor:
        """Return the logits."""
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(pixels))).mean(1))
        return logits


@cache
def images(file: str, split: str, classes: tuple[int, ...]) -> Images:
    """Return the images of some classes, numbered anew in that order, from ``$FEDKIT_DATA_DIR/cifar``."""
    with np.load(Path(os.environ["FEDKIT_DATA_DIR"], "cifar", file)) as found:
        x, y = found[f"x_{split}"], found[f"y_{split}"]
    new = np.full(int(y.max()) + 1, -1)
    new[list(classes)] = np.arange(len(classes))
    labels = new[y]
    pixels = torch.from_numpy(x[labels >= 0]).permute(0, 3, 1, 2).float() / 255
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return Images((pixels - mean) / deviation, torch.from_numpy(labels[labels >= 0]))


def halves() -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the classes of CIFAR-100 that the backbone is trained on, and those that are tasks."""
    order = np.random.default_rng(0).permutation(100).tolist()
    return tuple(order[:CLASSES]), tuple(order[CLASSES:])


def backbone(cache_dir: str, device: str, steps: int | None = None) -> tuple[VisionTransformer, float]:
    """Return the transformer and its accuracy; trained once, all epochs or some steps, then read from a file."""
    path = Path(cache_dir, f"rm_lora_vit-{EPOCHS if steps is None else f'{steps}-steps'}.safetensors")
    known, _ = halves()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = VisionTransformer(CLASSES).to(device)
        if path.exists():
            model.load_state_dict(load_file(path, device=device))
        else:
            pretrain(model, images("cifar100_10k_2k.npz", "train", known), device, steps)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}")  # others may be doing the same
            save_file({name: value.contiguous() for name, value in model.state_dict().items()}, partial)
            partial.rename(path)
    model.eval().requires_grad_(False)
    test = images("cifar100_10k_2k.npz", "test", known)
    found = torch.cat([model(part.to(device)).argmax(1).cpu() for part in test.pixels.split(256)])
    return model, float((found == test.labels).float().mean())


def pretrain(model: VisionTransformer, train: Images, device: str, steps: int | None) -> None:
    """Train in place, with AdamW and a rate that rises for a tenth of the steps and then falls like a cosine."""
    steps = EPOCHS * (len(train.labels) // BATCH) if steps is None else steps
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps + 1, pct_start=0.1)
    model.train()
    for pixels, labels in augmented(Images(*(part.to(device) for part in train)), steps):
        loss = functional.cross_entropy(model(pixels), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def augmented(train: Images, steps: int) -> Iterator[Images]:
    """Yield batches, each image moved by up to 4 pixels, half of them mirrored."""
    padded = functional.pad(train.pixels, (4, 4, 4, 4))
    side = torch.arange(SIDE, device=padded.device)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < BATCH:
            order = torch.randperm(len(padded))
        rows, order = order[:BATCH].to(padded.device), order[BATCH:]
        top, left = torch.randint(9, (2, len(rows), 1)).to(padded.device)
        columns = torch.where(torch.rand(len(rows), 1).to(padded.device) < 0.5, side, SIDE - 1 - side) + left
        crops = padded[rows[:, None, None], :, (top + side)[:, :, None], columns[:, None, :]]
        yield Images(crops.permute(0, 3, 1, 2), train.labels[rows])


def main() -> None:
    """Train and say how weak it is."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--cache", default="benchmark-runs", help="where it is kept (%(default)s)")
    chosen = options.parse_args()
    if chosen.device == "cpu":
        torch.set_num_threads(os.cpu_count() or 1)
    _, accuracy = backbone(chosen.cache, chosen.device)
    print(f"{100 * accuracy:.1f} % of the test images of its own {CLASSES} classes")


if __name__ == "__main__":
    main()
