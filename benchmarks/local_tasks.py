"""Federations whose clients train for several local steps, in two groups that hold half of the classes each.

=========  ==========================================================================================
`digits`   scikit-learn's digits, the MLP of `gradient_tasks`; 5 epochs of SGD, batches of 16
`cifar`    10,000 images of CIFAR-10, the CNN of `gradient_tasks`; some steps of SGD, batches of 32
=========  ==========================================================================================

Clients 0 to 9 hold the lower half of the classes, 10 to 19 the upper half; within a group, examples are dealt at
random. All clients have the same weight.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from benchmarks.federate import Federation, Reply
from benchmarks.gradient_tasks import cnn, cnn_output, images, mlp, mlp_gradient, mlp_output
from fedkit.arrays import NamedArrays

CLIENTS, CLASSES = 20, 10
EPOCHS, DIGITS_BATCH, DIGITS_RATE = 5, 16, 0.1
STEPS, CIFAR_BATCH, CIFAR_RATE = 5, 32, 0.1


def halves(labels: NDArray[np.int64], rng: np.random.Generator) -> list[NDArray[np.int64]]:
    """Return the examples of each client: the first half of them share the lower half of the classes."""
    parts: list[NDArray[np.int64]] = []
    for group in (labels < CLASSES // 2, labels >= CLASSES // 2):
        parts += np.array_split(rng.permutation(np.flatnonzero(group)), CLIENTS // 2)
    return parts


def digits(seed: int) -> Federation:
    """Return the digits, standardised: 1,347 to train with, 450 to test; `seed` decides everything else."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x.astype(np.float32), y, random_state=0, stratify=y)
    mean, deviation = x.mean(0), x.std(0) + 1e-6  # some pixels are always empty
    x, x_test = (x - mean) / deviation, (x_test - mean) / deviation
    rng = np.random.default_rng(seed)
    parts = halves(y, rng)

    def train(params: NamedArrays, client: int, server_round: int) -> Reply:
        part, local = parts[client], {name: array.copy() for name, array in params.items()}
        order, loss = np.random.default_rng([seed, server_round, client]), 0.0
        for _ in range(EPOCHS):
            shuffled = order.permutation(part)
            for start in range(0, len(part), DIGITS_BATCH):
                chosen = shuffled[start : start + DIGITS_BATCH]
                loss, gradient = mlp_gradient(local, x[chosen], y[chosen])
                for name, array in local.items():
                    array -= np.float32(DIGITS_RATE) * gradient[name]
        return local, {"num-examples": 1.0, "train-loss": loss}

    def accuracy(params: NamedArrays) -> float:
        return float((mlp_output(params, x_test)[1].argmax(1) == y_test).mean())

    return Federation(mlp(rng), CLIENTS, train, accuracy)


def cifar(seed: int) -> Federation:
    """Return CIFAR-10's subset, 10,000 images to train with and 2,000 to test; `seed` decides everything else.

    It is trained by CUDA where there is one.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, y, x_test, y_test = (part.to(device) for part in images())
    parts = halves(y.cpu().numpy(), np.random.default_rng(seed))

    def train(params: NamedArrays, client: int, server_round: int) -> Reply:
        order = np.random.default_rng([seed, server_round, client])
        tensors = {name: torch.tensor(a, device=device, requires_grad=True) for name, a in params.items()}
        optimizer = torch.optim.SGD(tensors.values(), lr=CIFAR_RATE)
        loss = torch.zeros(())
        batches = np.stack([order.choice(parts[client], CIFAR_BATCH, replace=False) for _ in range(STEPS)])
        for chosen in torch.from_numpy(batches).to(device):
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(cnn_output(tensors, x[chosen]), y[chosen])
            loss.backward()
            optimizer.step()
        local = {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}
        return local, {"num-examples": 1.0, "train-loss": float(loss.detach())}

    def accuracy(params: NamedArrays) -> float:
        tensors = {name: torch.from_numpy(array).to(device) for name, array in params.items()}
        with torch.inference_mode():
            parts_of = [slice(i, i + 500) for i in range(0, len(y_test), 500)]
            right = [(cnn_output(tensors, x_test[at]).argmax(1) == y_test[at]).sum() for at in parts_of]
        return float(sum(right)) / len(y_test)

    return Federation(cnn(seed), CLIENTS, train, accuracy)
