"""The server: start from one fresh adapter, run the rounds, test every task after each, save the adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedkit.aggregation.identities import Assignment, cluster_accuracy, clusters_of_tasks
from fedkit.aggregation.kmeans import Points
from fedkit.aggregation.slots import join_slots, split_clusters, split_slots
from fedkit.aggregation.tasks import Tasks
from fedkit.arrays import NamedArrays
from fedkit.clients.adapters import get_adapter, set_adapter
from fedkit.config import parse
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Tac, build
from multitask import task

app = ServerApp()


@dataclass(frozen=True, slots=True)
class Told(Tasks):
    """The clustering that is told which slot belongs where."""

    truth: Assignment = field(default_factory=dict)

    def label(self, clients: Sequence[str], points: Points, former: Points, held: Sequence[int] = ()) -> list[int]:
        """Return the true cluster of each adapter."""
        return [number for client in dict.fromkeys(clients) for number in self.truth[client]]


def build_strategy(config: task.Config) -> Strategy:
    """Return the strategy that the run config names, for all clients, evaluated on the server alone."""
    if config.shared:
        return build(config)
    truth = task.true_tasks(config)
    alone = own_clusters(truth)
    make = partial(
        Tac.published if config.clustering == "k-means" else Tac,
        num_clusters=sum(map(len, truth.values())) if config.clustering == "local" else len(task.names(config)),
        signature=config.signature,
        tasks=truth,
    )
    strategy = build(config, make=make)
    if config.clustering in ("oracle", "local"):
        known = alone if config.clustering == "local" else truth
        told = Told(strategy.num_clusters, evidence="adapters", screened=False, truth=known)
        strategy.aggregator = replace(strategy.aggregator, tasks=told)
    return strategy


def own_clusters(truth: Assignment) -> Assignment:
    """Return a cluster for every slot, shared with no other: each client trains alone."""
    numbers = count()
    return {client: tuple(next(numbers) for _ in tasks) for client, tasks in truth.items()}


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train an adapter per task with the clients that `grid` reaches."""
    config = parse(task.Config, context.run_config)
    strategy, model, truth = build_strategy(config), task.build_model(config), task.true_tasks(config)
    initial, names = get_adapter(model), task.names(config)
    tests = {name: task.headed(task.source(config).tests(config, name), name, config) for name in names}
    local = not config.shared and config.clustering == "local"

    def by_task(arrays: ArrayRecord) -> dict[str, list[NamedArrays]]:
        """Return the adapters of each task; nobody but the evaluation asks which clusters that are."""
        if not isinstance(strategy, Tac):
            return dict.fromkeys(names, split_slots(to_arrays(arrays), 1))
        clusters, assignment = split_clusters(to_arrays(arrays)), strategy.state.assignment
        if local:
            slots = [
                slot for client in truth for slot in zip(assignment.get(client, ()), truth[client], strict=False)
            ]
            return {
                name: [clusters[k] for k, j in slots if j == n] or clusters[:1] for n, name in enumerate(names)
            }
        found = clusters_of_tasks(assignment, truth)
        return {name: [clusters[found.get(number, number)]] for number, name in enumerate(names)}

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        metrics: dict[str, float] = {}
        if not config.tested(server_round):
            return MetricRecord()
        for name, adapters in by_task(arrays).items():
            shares = []
            for adapter in adapters:
                set_adapter(model, adapter)
                shares.append(task.accuracy(model, tests[name], config))
            metrics[f"accuracy-{name}"] = sum(shares) / len(shares)
        metrics["accuracy"] = sum(metrics.values()) / len(metrics)
        if isinstance(strategy, Tac) and strategy.state.assignment and not local:
            metrics["cluster-accuracy"] = cluster_accuracy(strategy.state.assignment, truth)
        return MetricRecord(metrics)

    rounds = RoundGrid(grid, faults=config.schedule(), limits=config.limits())
    result = strategy.start(
        grid=rounds,
        initial_arrays=from_arrays(initial if isinstance(strategy, Tac) else join_slots([initial])),
        num_rounds=config.num_rounds,
        evaluate_fn=rounds.ledger.recording(evaluate, to=config.folder),
    )
    if config.folder:
        for name, adapters in by_task(result.arrays).items():
            set_adapter(model, adapters[0])
            model.save_pretrained(config.folder / "adapters" / name)
