"""The strategies by the names that ``--strategy`` and the run config use."""

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
    "laq": Aquila.laq,  # this and the next three: baselines of AQUILA
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
    """Return the strategy that a run config names, set up to train with all clients of that config.

    Clients evaluate only with `clients_evaluate`, and then all of them do. If the config has a `run_dir`, the
    strategy saves the run there after each round, and `start` resumes a run that it finds there; Flower's own
    FedAvg cannot be resumed and starts again. Pass `make` to construct the strategy where its name is not enough.

    Raises
    ------
    ConfigError
        For an unknown strategy or option, with the nearest known name, and for options that cannot be combined.
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
    """Return the class that `make` constructs: `make` is a class, a class method, or a `partial` of either."""
    found: Any = getattr(make, "func", make)
    of: type[FedAvg] = getattr(found, "__self__", found)
    return of
