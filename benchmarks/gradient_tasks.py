"""Federations whose clients take one step of SGD: a reply is θ − α∇f, so an update is −α times a gradient.

=========  ==========================================================================================
`digits`   scikit-learn's digits, an MLP of 4,810 parameters in numpy; 10 clients, two classes' worth each
`cifar`    10,000 images of CIFAR-10, a CNN of 89,834 parameters in torch; 10 clients, Dirichlet(alpha)
=========  ==========================================================================================

All clients have the same weight. The CNN takes its widths from the arrays that it is given, so a client may be
sent a part of it.
"""

from __future__ import annotations

import os
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.federate import Federation, Reply
from fedkit.arrays import NamedArrays
from fedkit.clients.partition import partition

CLIENTS = 10
DIGITS_RATE, CIFAR_RATE = 0.1, 0.1
CIFAR_BATCH = 32
WIDTHS = (3, 16, 32, 64)  # channels before and after each convolution
HIDDEN = 64
HALF = "half"  # the sub-model of half the width


def digits(seed: int, batch: int | None) -> Federation:
    """Return the digits, standardised: 1,347 to train with, sorted and dealt in shards, two a client; 450 to test.

    Parameters
    ----------
    seed : int
        Decides the shards, the initial arrays and the batches.
    batch : int, optional
        How many of its about 134 examples a client looks at in a round; all if unset.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x.astype(np.float32), y, random_state=0, stratify=y)
    mean, deviation = x.mean(0), x.std(0) + 1e-6  # some pixels are always empty
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    rng = np.random.default_rng(seed)
    shards = np.array_split(np.argsort(y, kind="stable"), 2 * CLIENTS)
    pairs = rng.permutation(2 * CLIENTS).reshape(CLIENTS, 2)
    parts = [np.concatenate([shards[i] for i in pair]) for pair in pairs]

    def train(params: NamedArrays, client: int, server_round: int) -> Reply:
        chosen = draw(parts[client], batch, seed, server_round, client)
        return step(params, *mlp_gradient(params, x[chosen], y[chosen]), DIGITS_RATE)

    def accuracy(params: NamedArrays) -> float:
        return float((mlp_output(params, x_test)[1].argmax(1) == y_test).mean())

    return Federation(mlp(rng), CLIENTS, train, accuracy)


def mlp(rng: np.random.Generator) -> dict[str, NDArray[np.float32]]:
    """Return the initial arrays of the MLP."""
    return {
        "hidden.weight": (rng.normal(size=(64, 64)) / 8).astype(np.float32),
        "hidden.bias": np.zeros(64, np.float32),
        "output.weight": (rng.normal(size=(64, 10)) / 8).astype(np.float32),
        "output.bias": np.zeros(10, np.float32),
    }


def mlp_output(params: NamedArrays, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the hidden layer's output and the logits."""
    hidden = np.tanh(x @ params["hidden.weight"] + params["hidden.bias"])
    return hidden, hidden @ params["output.weight"] + params["output.bias"]


def mlp_gradient(params: NamedArrays, x: NDArray[Any], y: NDArray[Any]) -> tuple[float, NamedArrays]:
    """Return the mean cross-entropy and its gradient."""
    hidden, logits = mlp_output(params, x)
    error = np.exp(logits - logits.max(1, keepdims=True))
    error /= error.sum(1, keepdims=True)
    loss = -float(np.log(error[np.arange(len(y)), y] + 1e-12).mean())
    error[np.arange(len(y)), y] -= 1
    error /= len(y)
    back = (error @ params["output.weight"].T) * (1 - hidden**2)
    return loss, {
        "hidden.weight": x.T @ back,
        "hidden.bias": back.sum(0),
        "output.weight": hidden.T @ error,
        "output.bias": error.sum(0),
    }


@cache
def images() -> tuple[Any, Any, Any, Any]:
    """Return CIFAR-10's subset as tensors, standardised: images and labels to train with, and to test with."""
    import torch

    torch.set_num_threads(1)
    data = np.load(Path(os.environ["FEDKIT_DATA_DIR"], "cifar", "cifar10_10k_2k.npz"))
    mean, deviation = np.float32([0.4914, 0.4822, 0.4465]), np.float32([0.2470, 0.2435, 0.2616])

    def load(name: str) -> tuple[Any, Any]:
        x = (data[f"x_{name}"].astype(np.float32) / 255 - mean) / deviation
        return torch.from_numpy(x.transpose(0, 3, 1, 2).copy()), torch.from_numpy(
            data[f"y_{name}"].astype(np.int64)
        )

    return *load("train"), *load("test")


def cifar(seed: int, dirichlet_alpha: float, *, two_sizes: bool = False) -> Federation:
    """Return the images, spread by Dirichlet(`dirichlet_alpha`); `seed` decides everything else.

    With `two_sizes` every other client holds the sub-model `HALF`.
    """
    import torch

    x, y, x_test, y_test = images()
    parts = partition(y.numpy(), num_clients=CLIENTS, alpha=dirichlet_alpha, seed=seed, at_least=CIFAR_BATCH)

    def train(params: NamedArrays, client: int, server_round: int) -> Reply:
        chosen = draw(parts[client], CIFAR_BATCH, seed, server_round, client)
        tensors = {name: torch.tensor(array, requires_grad=True) for name, array in params.items()}
        loss = torch.nn.functional.cross_entropy(cnn_output(tensors, x[chosen]), y[chosen])
        gradients = torch.autograd.grad(loss, list(tensors.values()))
        by_name = dict(zip(tensors, [gradient.numpy() for gradient in gradients], strict=True))
        return step(params, float(loss.detach()), by_name, CIFAR_RATE)

    def accuracy(params: NamedArrays) -> float:
        tensors = {name: torch.from_numpy(array) for name, array in params.items()}
        with torch.inference_mode():
            right = [
                (cnn_output(tensors, x_test[i : i + 500]).argmax(1) == y_test[i : i + 500]).sum()
                for i in range(0, len(y_test), 500)
            ]
        return float(sum(right)) / len(y_test)

    held = [HALF if two_sizes and client % 2 else "" for client in range(CLIENTS)]
    return Federation(cnn(seed), CLIENTS, train, accuracy, held)


def cnn(seed: int) -> dict[str, NDArray[np.float32]]:
    """Return the initial arrays of the CNN, by He's rule."""
    rng = np.random.default_rng(seed)
    shapes = {f"conv{i}": (out, into, 3, 3) for i, (into, out) in enumerate(pairwise(WIDTHS))}
    shapes |= {"hidden": (HIDDEN, WIDTHS[-1] * 16), "output": (10, HIDDEN)}
    arrays = {}
    for name, shape in shapes.items():
        deviation = np.sqrt(2 / np.prod(shape[1:]))
        arrays[f"{name}.weight"] = (rng.normal(size=shape) * deviation).astype(np.float32)
        arrays[f"{name}.bias"] = np.zeros(shape[0], np.float32)
    return arrays


def cnn_output(params: dict[str, Any], x: Any) -> Any:
    """Return the logits: three convolutions, each halving the image, and two layers; tensors in and out."""
    from torch.nn import functional as F  # noqa: N812

    for i in range(len(WIDTHS) - 1):
        x = F.relu(F.conv2d(x, params[f"conv{i}.weight"], params[f"conv{i}.bias"], stride=2, padding=1))
    x = F.relu(F.linear(x.flatten(1), params["hidden.weight"], params["hidden.bias"]))
    return F.linear(x, params["output.weight"], params["output.bias"])


def draw(
    part: NDArray[np.int64], batch: int | None, seed: int, server_round: int, client: int
) -> NDArray[np.int64]:
    """Return the examples of a client's batch: others in each round, the same when run again."""
    if batch is None:
        return part
    return np.random.default_rng([seed, server_round, client]).choice(part, batch, replace=False)


def step(params: NamedArrays, loss: float, gradient: NamedArrays, rate: float) -> Reply:
    """Return the reply of a client; every client counts the same."""
    local = {name: array - np.float32(rate) * gradient[name] for name, array in params.items()}
    return local, {"num-examples": 1.0, "train-loss": loss}
