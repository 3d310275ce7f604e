"""Strategies by name, as `--strategy` and the run config spell them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final

from flwr.serverapp.strategy import FedAvg, Strategy

from fedkit.config import RunConfig, check_keys

from .aquila import Aquila
from .error_feedback import ErrorFeedback
from .from_config import read_options
from .marina import Marina
from .plain import Plain
from .safari import Safari
from .tac import Tac

STRATEGIES: Final[dict[str, Callable[..., Strategy]]] = {
    "fedavg": FedAvg,  # Flower's own
    "aquila": Aquila,
    "aquila-published": Aquila.published,
    "laq": Aquila.laq,  # this and the next three: what AQUILA is compared with
    "qsgd": Plain.qsgd,
    "adaquantfl": Plain.adaquantfl,
    "marina": Marina,
    "error-feedback": ErrorFeedback,
    "safari": Safari,
    "safari-published": Safari.published,
    "safari-drop": partial(Safari, missing="drop"),  # for comparison: missing clients are dropped
    "tac": partial(Tac, num_clusters=1),  # one task; an app with several says how many
}


def build(
    config: RunConfig, *, clients_evaluate: bool = False, make: Callable[..., Strategy] | None = None
) -> Strategy:
    """Return the strategy that a run config names, for all its clients, evaluated by them or on the server alone.

    With a `run_dir` it saves itself there after each round, and `start` takes up what it finds; not so Flower's
    FedAvg, which cannot be resumed and starts again. `make` constructs it where a name does not say enough.

    Raises
    ------
    ConfigError
        For an unknown name, or an unknown option, with the nearest known one; for options that do not go together.
    """
    check_keys([config.strategy], STRATEGIES, what="strategy")
    make, everybody = make or STRATEGIES[config.strategy], config.num_clients
    options: dict[str, Any] = {"min_train_nodes": everybody, "min_available_nodes": everybody}
    options["fraction_evaluate"] = float(clients_evaluate)
    if clients_evaluate:
        options["min_evaluate_nodes"] = everybody
    if make is not FedAvg:
        options["checkpoint"] = config.folder or ""
    return make(**options | read_options(config.strategy_options, make, class_of(make)))


def class_of(make: Callable[..., Strategy]) -> type[FedAvg]:
    """Return what is constructed: by a class, by a method of one, or by a part of either."""
    found: Any = getattr(make, "func", make)
    of: type[FedAvg] = getattr(found, "__self__", found)
    return of
