"""The server: start from a fresh adapter, run the rounds, test after each, save the adapter.

It runs with or without torch. Without, a client says what to start from, and the clients test.
"""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedkit.adapter import ask_for_adapter
from fedkit.aggregation.slots import only_cluster
from fedkit.config import parse
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import build
from quickstart import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the digits' adapter with the clients that `grid` reaches."""
    config = parse(task.Config, context.run_config)
    first_half = map(str, range(config.num_clients // 2))
    rates = {"rates": dict.fromkeys(first_half, config.drop_half)} if config.drop_half else {}
    rounds = RoundGrid(grid, faults=config.schedule(**rates), limits=config.limits())
    adapter = task.initial_adapter(config) if task.HAS_TORCH else ask_for_adapter(rounds)
    test = task.evaluator(config) if task.HAS_TORCH else None

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
        found = only_cluster(to_arrays(arrays))
        return MetricRecord(test(found)) if test else None

    result = build(config, clients_evaluate=test is None).start(
        grid=rounds,
        initial_arrays=from_arrays(adapter.arrays),
        num_rounds=config.num_rounds,
        evaluate_fn=rounds.ledger.recording(evaluate, to=config.folder),
    )
    if config.folder:
        adapter.save(config.folder / "adapter", only_cluster(to_arrays(result.arrays)))
