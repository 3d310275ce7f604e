"""The server: start from a fresh adapter, run the rounds, test after each, save the adapter."""

from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedkit.aggregation.slots import split_clusters
from fedkit.clients.adapters import get_adapter, set_adapter
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
    model = task.build_model(config)
    _, _, images, labels = task.load_split()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_adapter(model, *split_clusters(to_arrays(arrays)))  # one, also under TAC, for there is one task
        return MetricRecord(task.evaluate(model, images, labels))

    first_half = map(str, range(config.num_clients // 2))
    rates = {"rates": dict.fromkeys(first_half, config.drop_half)} if config.drop_half else {}
    rounds = RoundGrid(grid, faults=config.schedule(**rates))
    result = build(config).start(
        grid=rounds,
        initial_arrays=from_arrays(get_adapter(model)),
        num_rounds=config.num_rounds,
        evaluate_fn=rounds.ledger.recording(evaluate, to=config.run_dir),
    )
    if config.run_dir:
        set_adapter(model, *split_clusters(to_arrays(result.arrays)))
        model.save_pretrained(Path(config.run_dir, "adapter"))
