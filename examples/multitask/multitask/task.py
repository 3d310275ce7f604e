"""Clients, slots, training and evaluation of the multitask example.

What the tasks are is in `multitask.digits` and `multitask.glue`; each task's training examples are spread unevenly
over the clients, so that most hold a few of the tasks. torch is imported inside the functions: Flower imports this
module for every message, also where nothing is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedkit.clients.partition import split
from fedkit.config import RunConfig, check_keys
from fedkit.errors import ConfigError
from multitask.examples import Examples, device, together

if TYPE_CHECKING:
    from peft import PeftModel

MIN_SHARE = 0.01
"""Below this share of a task's examples a client does not hold the task."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Config(RunConfig):
    """The keys of `[tool.flwr.app.config]`, typed; each stands there in kebab-case."""

    data: str  # "digits"; or tasks of GLUE: "glue" on the hub, or the whole path of a folder with one for each
    examples: int  # of each task of GLUE, at most; to train with, and to test with
    model: str  # the encoder of these: a folder or a name on the hub; empty: MiniLM
    adapted_blocks: int  # how many of its blocks, the last ones, carry adapters
    max_tokens: int  # what a text has beyond is cut off
    learning_rate: float
    local_steps: int  # for each task of a client
    batch_size: int
    r: int  # of one task's adapter
    active_rank: int  # of RM-LoRA; `r`, with an `orth_reg_weight` of 0: plain LoRA
    orth_reg_weight: float
    shared_r: int  # of an adapter for all tasks; 0: as large as all of theirs
    lora_alpha: int  # for `r`; the ratio of the two is that of a shared adapter, too
    dirichlet_alpha: float  # how unevenly tasks are spread: 100 is evenly
    clustering: (
        str  # of tac: "distinct"; "k-means": as published; for comparison "oracle": told the tasks; "local"
    )
    signature: str  # of tac: "factors" or "product"
    test_rounds: int  # how many rounds, the last ones, are followed by a test; 0: all
    heads: str  # of fedavg's adapter: "one", or one "per-task", as if all agreed on what the tasks are

    def __post_init__(self) -> None:
        # Named, for a dataclass with slots is another class than the one `super()` was compiled in.
        RunConfig.__post_init__(self)
        check_keys([self.strategy], ["tac", "fedavg"], what="strategy")
        check_keys([self.clustering], ["distinct", "k-means", "oracle", "local"], what="clustering")
        check_keys([self.heads], ["one", "per-task"], what="heads")

    def tested(self, server_round: int) -> bool:
        """Return whether a round is followed by a test."""
        return self.test_rounds == 0 or server_round > self.num_rounds - self.test_rounds

    @property
    def shared(self) -> bool:
        """Whether there is one adapter for all tasks."""
        return self.strategy == "fedavg"


def source(config: Config) -> Any:
    """Return the module that has the tasks."""
    return import_module("multitask.digits" if config.data == "digits" else "multitask.glue")


def names(config: Config) -> tuple[str, ...]:
    """Return the names of the tasks."""
    found: tuple[str, ...] = source(config).names(config)
    return found


def build_model(config: Config) -> PeftModel:
    """Return the frozen pre-trained model with a fresh adapter, the same for the same seed."""
    import torch
    from peft import LoraConfig, get_peft_model

    of, size, heads = source(config), 1, 1
    if config.shared:
        size = config.shared_r // config.r or len(names(config))
        heads = len(names(config)) if config.heads == "per-task" else 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        lora = LoraConfig(
            r=config.r * size,
            lora_alpha=config.lora_alpha * size,
            target_modules=list(of.TARGETS),
            modules_to_save=[of.HEAD],
        )
        return get_peft_model(of.build_base(config, of.OUTPUTS * heads), lora).to(device())


def partition(
    sizes: dict[str, int], *, num_clients: int, alpha: float, seed: int
) -> list[dict[str, NDArray[np.int64]]]:
    """Return each client's tasks with the numbers of their examples, every task spread by Dirichlet(`alpha`).

    Raises
    ------
    ConfigError
        If no draw leaves every client a task.
    """
    rng = np.random.default_rng(seed)
    for _ in range(1000):
        parts: list[dict[str, NDArray[np.int64]]] = [{} for _ in range(num_clients)]
        for name, size in sizes.items():
            shares = rng.dirichlet(np.full(num_clients, alpha))
            for part, piece in zip(parts, split(rng.permutation(size), shares), strict=True):
                if len(piece) >= MIN_SHARE * size:
                    part[name] = piece
        if all(parts):
            return parts
    raise ConfigError(
        f"no split gives each of {num_clients} clients a task at dirichlet-alpha {alpha}. "
        "Take fewer clients or a larger dirichlet-alpha."
    )


class Slot(NamedTuple):
    """What one adapter of a client is trained with."""

    examples: Examples
    steps: int  # in each round


def load_slots(config: Config, partition_id: int) -> list[Slot]:
    """Return a slot for each task of one client; only one, with all of them, if the adapter is shared."""
    part = _partition(config)[partition_id]
    slots = [
        Slot(headed(source(config).examples(config, name, ids), name, config), config.local_steps)
        for name, ids in part.items()
    ]
    if config.shared:
        return [Slot(together([slot.examples for slot in slots]), sum(slot.steps for slot in slots))]
    return slots


def headed(examples: Examples, name: str, config: Config) -> Examples:
    """Return a task's examples with the labels of its head."""
    per_task = config.shared and config.heads == "per-task"
    return examples.shifted(source(config).OUTPUTS * names(config).index(name) * per_task)


def true_tasks(config: Config) -> dict[str, tuple[int, ...]]:
    """Return the task of each slot, as its number in `names`, by client id; only evaluation may know."""
    numbers = {name: number for number, name in enumerate(names(config))}
    return {str(i): tuple(numbers[name] for name in part) for i, part in enumerate(_partition(config))}


def _partition(config: Config) -> list[dict[str, NDArray[np.int64]]]:
    sizes = {name: source(config).size(config, name) for name in names(config)}
    return partition(sizes, num_clients=config.num_clients, alpha=config.dirichlet_alpha, seed=config.seed)


def local_seed(config: Config, *numbers: int) -> int:
    """Return the seed of one training: another for each round, client and slot, the same when run again."""
    return int(np.random.SeedSequence((config.seed, *numbers)).generate_state(1)[0])


def train(model: PeftModel, slot: Slot, config: Config, *, seed: int) -> float:
    """Train the adapter of `model` in place; return the mean loss."""
    import torch

    from fedkit.clients.rm_lora import RMLoraConfig

    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = source(config).optimizer(trainable, config)
    rng, losses = np.random.default_rng(seed), []
    rm_lora = RMLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        active_rank=config.active_rank,
        orth_reg_weight=config.orth_reg_weight,
        target_modules=tuple(source(config).TARGETS),
    )
    masked, penalty = rm_lora.masked_step(model, seed), rm_lora.regularizer(model)
    model.train()
    for step in range(slot.steps):
        rows = rng.choice(len(slot.examples), config.batch_size)
        loss = torch.nn.functional.cross_entropy(*_own_head(model, slot.examples, rows, config))
        optimizer.zero_grad()
        loss.backward()
        if penalty:
            penalty.add_gradient(config.orth_reg_weight)
        if masked:
            masked.before(step, optimizer)
        optimizer.step()
        if masked:
            masked.after(optimizer)
        losses.append(loss.item())
    return sum(losses) / len(losses)


def accuracy(model: PeftModel, examples: Examples, config: Config) -> float:
    """Return the share of examples that `model` answers rightly, in [0, 1]."""
    import torch

    model.eval()
    right = 0
    with torch.inference_mode():
        for rows in np.array_split(np.arange(len(examples)), -(-len(examples) // 128)):
            logits, targets = _own_head(model, examples, rows, config)
            right += int((logits.argmax(-1) == targets).sum())
    return right / len(examples)


def _own_head(model: PeftModel, examples: Examples, rows: NDArray[np.int64], config: Config) -> tuple[Any, Any]:
    """Return the logits of the head that each label belongs to, and the labels within it."""
    (inputs, labels), outputs = examples.batch(rows, next(model.parameters()).device), source(config).OUTPUTS
    heads = model(**inputs).logits.unflatten(-1, (-1, outputs))
    return heads[range(len(labels)), labels // outputs], labels % outputs
