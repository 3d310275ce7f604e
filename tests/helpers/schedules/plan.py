"""What a random schedule is made of: everything is drawn from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, Final

from fedkit.aggregation.missing import Missing
from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.sparsify import TopK
from fedkit.codec.wire import Codec
from fedkit.faults import Bursts, Faults
from fedkit.limits import Limits
from fedkit.strategies import Aquila, ErrorFeedback, Safari, UpdateStrategy

MODS: Final[dict[str, type]] = {"aquila": AquilaMod, "error-feedback": ErrorFeedbackMod, "safari": SafariMod}
NODE_TIMEOUT: Final = 20.0
TIMEOUT: Final = 60.0
EVENTS: Final = ("restart", "wipe", "rewind", "rename", "vanish")  # with clients, whenever messages are sent
FATES: Final = ("slow", "never", "die", "killed", "raise", "nan", "corrupt")  # of single messages


@dataclass(frozen=True)
class Plan:
    """One schedule.

    Parameters
    ----------
    seed : int
        All that is not said below is drawn from it as the run goes on.
    scheme : str
        Which mod the clients have.
    options : dict
        Of the strategy.
    durable : tuple of bool
        Whether each client keeps its state in a folder; else it ends with its node.
    rates : dict of str to float
        Probability of each of `EVENTS` and `FATES`.
    cut : float
        Probability that the server loses power, at each point where that might matter.
    new_ids : bool
        Whether nodes get new ids when the server restarts.
    """

    seed: int
    rounds: int
    scheme: str
    options: dict[str, Any]
    limits: Limits
    faults: Faults
    durable: tuple[bool, ...]
    rates: dict[str, float]
    cut: float
    new_ids: bool
    resumable: bool

    @property
    def clients(self) -> int:
        """How many clients there are."""
        return len(self.durable)

    def strategy(self, checkpoint: str) -> UpdateStrategy[Any]:
        """Return a new strategy; `checkpoint` is a folder, or empty."""
        makers: dict[str, type[UpdateStrategy[Any]]] = {
            "aquila": Aquila,
            "error-feedback": ErrorFeedback,
            "safari": Safari,
        }
        return makers[self.scheme](
            limits=self.limits, checkpoint=checkpoint, node_timeout=NODE_TIMEOUT, seed=self.seed, **self.options
        )


def draw(seed: int) -> Plan:
    """Return the schedule of a seed."""
    rng = random.Random(f"plan/{seed}")
    clients, resumable = rng.choice([2, 2, 3, 3, 4, 5]), rng.random() < 0.8
    scheme = rng.choice(["aquila", "aquila", "error-feedback", "safari"])
    options = _common(rng, clients) | _options(rng, scheme)
    calm = rng.random() < 0.3  # little goes wrong: what comes after many good rounds is tried, too
    rates = {name: rng.choice([0.0, 0.0, 0.03, 0.15]) * (not calm) for name in EVENTS + FATES}
    return Plan(
        seed=seed,
        rounds=rng.choice([2, 3, 3, 4, 4, 5, 6, 8]),
        scheme=scheme,
        options=options,
        limits=Limits(
            quorum=rng.choice([0.0, 0.0, 0.5, 0.8, 1.0]),
            grace=rng.choice([None, 0.0, 2.0]),
            deadline=rng.choice([None, 4.0, 25.0]),
            late=rng.choice(["use", "use", "discard"]),
            below_quorum="error" if rng.random() < 0.1 else "keep",
        ),
        faults=_faults(rng, resumable),
        durable=tuple(rng.random() < 0.5 for _ in range(clients)),
        rates=rates,
        cut=rng.choice([0.0, 0.01, 0.04]) if resumable else 0.0,
        new_ids=rng.random() < 0.5,
        resumable=resumable,
    )


def _common(rng: random.Random, clients: int) -> dict[str, Any]:
    sampled = rng.random() < 0.4
    return {
        "fraction_train": rng.choice([0.4, 0.7]) if sampled else 1.0,
        "min_train_nodes": rng.randint(1, 2) if sampled else rng.randint(1, clients),
        "min_available_nodes": rng.randint(1, clients),
        "fraction_evaluate": rng.choice([0.0, 0.0, 0.0, 0.0, 1.0]),
        "min_evaluate_nodes": 1,
        "weighted": rng.random() < 0.7,
        "downlink": rng.choice([None, Codec(ZeroMidTread()), Codec(ZeroMidTread(2, 2), TopK(0.3))]),
    }


def _options(rng: random.Random, scheme: str) -> dict[str, Any]:
    if scheme == "aquila":
        return {"memory": rng.choice(["each", "sum"]), "beta": rng.choice([0.0, 0.2, 2.0])}
    if scheme == "error-feedback":
        quantizer = rng.choice([ZeroMidTread(), ZeroMidTread(2, 2), None])
        return {"quantizer": quantizer or ZeroMidTread(), "sparsifier": None if quantizer else TopK(0.1)}
    return {
        "density": rng.choice([0.3, 0.6, 1.0]),
        "rewire": rng.choice([0.1, 1.0]),
        "missing": Missing(own=False, warmup_rounds=rng.randint(0, 2)) if rng.random() < 0.7 else Missing("drop"),
        "quantizer": rng.choice([None, ZeroMidTread()]),
    }


def _faults(rng: random.Random, resumable: bool) -> Faults:
    rare = [0.0, 0.0, 0.1, 0.4]
    return Faults(
        drop=rng.choice(rare),
        seed=rng.randrange(2**31),
        bursts=Bursts(0.2, 0.4) if rng.random() < 0.2 else None,
        late=rng.choice(rare),
        mean_delay=rng.choice([1.0, 8.0, 40.0]),
        duplicate=rng.choice(rare),
        client_crash=rng.choice([0.0, 0.0, 0.1]),
        server_crash_rounds=(rng.randint(2, 8),) if rng.random() < 0.2 and resumable else (),
    )
