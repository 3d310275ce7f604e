"""The server: start from a fresh adapter, run the rounds, test after each, save the adapter."""

from pathlib import Path

from fedkit.clients.adapters import get_adapter, set_adapter
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from fedkit.config import parse
from fedkit.message import from_arrays, to_arrays
from quickstart import task

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train the digits' adapter with the clients that `grid` reaches."""
    config = parse(task.Config, context.run_config)
    model = task.build_model(config)
    _, _, images, labels = task.load_split()

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_adapter(model, to_arrays(arrays))
        return MetricRecord(task.evaluate(model, images, labels))

    strategy = FedAvg(
        fraction_evaluate=0.0, min_train_nodes=config.num_clients, min_available_nodes=config.num_clients
    )
    result = strategy.start(
        grid=grid,
        initial_arrays=from_arrays(get_adapter(model)),
        num_rounds=config.num_rounds,
        evaluate_fn=evaluate,
    )
    if config.run_dir:
        set_adapter(model, to_arrays(result.arrays))
        model.save_pretrained(Path(config.run_dir, "adapter"))
