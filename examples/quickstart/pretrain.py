"""Pre-train the quickstart's vision transformer on Fashion-MNIST and write it as a fedkit asset.

Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017; MIT licence) shares neither images nor classes with the
digits, so nothing the clients hold was seen here. Its images are brought to 8x8 the way the digits were
made: padded to 32x32, then averaged over 4x4 blocks. The model learns to tell the garment and by how many
quarters the image was turned, 40 classes in all: which way a stroke runs matters to digits as well.

    FEDKIT_DATA_DIR=... python pretrain.py        # reads $FEDKIT_DATA_DIR/fashion-mnist
    python pretrain.py --data DIR                 # reads DIR
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from quickstart.task import evaluate, to_pixel_values
from safetensors.torch import save_file
from transformers import ViTForImageClassification

import fedkit.assets
from fedkit.clients.small_vit import ASSET, build_small_vit


def read_images(path: Path) -> NDArray[np.float32]:
    """Return the images of an idx3 file as 8x8 area averages in [0, 1], shape (n, 8, 8)."""
    with gzip.open(path) as file:
        images = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    return padded.reshape(-1, 8, 4, 8, 4).mean(axis=(2, 4), dtype=np.float32) / 255


def read_labels(path: Path) -> NDArray[np.int64]:
    """Return the labels of an idx1 file, shape (n,)."""
    with gzip.open(path) as file:
        return np.frombuffer(file.read(), np.uint8, offset=8).astype(np.int64)


def turn(pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images, each turned by 0 to 3 quarters, and the numbers of quarters."""
    quarters = torch.arange(len(pixel_values)) % 4
    turned = torch.empty_like(pixel_values)
    for k in range(4):
        turned[k::4] = torch.rot90(pixel_values[k::4], k, (2, 3))
    return turned, quarters


def train(
    model: ViTForImageClassification,
    images: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 2e-3,
) -> None:
    """Train all of `model` with AdamW under one learning-rate cycle."""
    pixel_values, targets = to_pixel_values(images), torch.from_numpy(labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=0.05)
    steps = epochs * (len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    model.train()
    for epoch in range(epochs):
        for batch in torch.randperm(len(labels))[: len(labels) // batch_size * batch_size].split(batch_size):
            turned, quarters = turn(pixel_values[batch])
            loss = model(pixel_values=turned, labels=targets[batch] + 10 * quarters).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}/{epochs}: last loss {loss.item():.3f}", flush=True)


def main() -> None:
    """Pre-train, report the test accuracy, write the weights without the head in float16."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, help="folder of the four Fashion-MNIST idx gz files")
    parser.add_argument(
        "--out", type=Path, default=Path(fedkit.assets.__file__).with_name(ASSET), help="where the weights go"
    )
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = args.data or Path(os.environ["FEDKIT_DATA_DIR"], "fashion-mnist")

    torch.manual_seed(args.seed)
    model = build_small_vit(num_labels=40)
    train(
        model,
        read_images(data / "train-images-idx3-ubyte.gz"),
        read_labels(data / "train-labels-idx1-ubyte.gz"),
        epochs=args.epochs,
    )
    metrics = evaluate(
        model,
        read_images(data / "t10k-images-idx3-ubyte.gz"),
        read_labels(data / "t10k-labels-idx1-ubyte.gz"),
    )
    print(f"test accuracy, images upright: {metrics['accuracy']:.4f}")

    state = {name: value for name, value in model.state_dict().items() if not name.startswith("classifier.")}
    save_file({name: value.half() for name, value in state.items()}, args.out)
    print(f"wrote {args.out}, SHA-256 {hashlib.sha256(args.out.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    main()
