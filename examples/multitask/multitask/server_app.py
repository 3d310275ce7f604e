"""The server: start from one fresh adapter, run the rounds, test every task after each, save the adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy

from fedkit.aggregation.cluster import Assignment, ClusterMean, Points, cluster_accuracy, clusters_of_tasks
from fedkit.aggregation.slots import join_slots, split_clusters, split_slots
from fedkit.arrays import NamedArrays
from fedkit.clients.adapters import get_adapter, set_adapter
from fedkit.config import parse
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Tac, build
from multitask import task

app = ServerApp()


@dataclass(frozen=True, slots=True)
class ByTask(ClusterMean):
    """TAC told the truth: adapters are averaged by the tasks they are for."""

    tasks: Assignment = field(default_factory=dict)

    def label(self, clients: Sequence[str], points: Points, former: Points) -> list[int]:
        """Return the true task of each adapter."""
        return [number for client in dict.fromkeys(clients) for number in self.tasks[client]]


def build_strategy(config: task.Config) -> Strategy:
    """Return the strategy that the run config names, for all clients, evaluated on the server alone."""
    if config.shared:
        return build(config)
    everybody = config.num_clients
    strategy = Tac(
        num_clusters=len(task.TASKS),
        distinct=config.clustering == "distinct",
        checkpoint=config.folder or "",
        fraction_evaluate=0.0,
        min_train_nodes=everybody,
        min_available_nodes=everybody,
    )
    if config.clustering == "oracle":
        strategy.aggregator = ByTask(len(task.TASKS), tasks=task.true_tasks(config))
    return strategy


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train an adapter per task with the clients that `grid` reaches."""
    config = parse(task.Config, context.run_config)
    strategy, model, truth = build_strategy(config), task.build_model(config), task.true_tasks(config)
    initial = get_adapter(model)
    _, _, images, digits = task.load_split()

    def by_task(arrays: ArrayRecord) -> dict[str, NamedArrays]:
        """Return the adapter of each task; nobody but the evaluation asks which cluster that is."""
        if not isinstance(strategy, Tac):
            return dict.fromkeys(task.TASKS, *split_slots(to_arrays(arrays), 1))
        clusters, found = split_clusters(to_arrays(arrays)), clusters_of_tasks(strategy.state.assignment, truth)
        return {name: clusters[found.get(number, number)] for number, name in enumerate(task.TASKS)}

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        metrics = {}
        for name, adapter in by_task(arrays).items():
            set_adapter(model, adapter)
            metrics[f"accuracy-{name}"] = task.accuracy(model, images, task.answers(name, digits, config))
        metrics["accuracy"] = sum(metrics.values()) / len(metrics)
        if isinstance(strategy, Tac) and strategy.state.assignment:
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
        for name, adapter in by_task(result.arrays).items():
            set_adapter(model, adapter)
            model.save_pretrained(config.folder / "adapters" / name)
