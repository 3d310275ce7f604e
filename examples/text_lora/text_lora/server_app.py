"""The server: start from a fresh adapter, run the rounds, test after each, save the adapter."""

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp

from fedkit.aggregation.slots import only_cluster
from fedkit.clients.adapters import describe, set_adapter
from fedkit.config import parse
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import build
from text_lora import task
from text_lora.data import load_split
from text_lora.model import build_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train an adapter with the clients that `grid` reaches."""
    config = parse(task.Config, context.run_config)
    model, (_, rows) = build_model(config), load_split(config)
    adapter = describe(model)

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_adapter(model, only_cluster(to_arrays(arrays)))
        return MetricRecord(task.evaluate(model, rows, config))

    rounds = RoundGrid(grid, faults=config.schedule(), limits=config.limits())
    result = build(config).start(
        grid=rounds,
        initial_arrays=from_arrays(adapter.arrays),
        num_rounds=config.num_rounds,
        evaluate_fn=rounds.ledger.recording(evaluate, to=config.folder),
    )
    if config.folder:
        adapter.save(config.folder / "adapter", only_cluster(to_arrays(result.arrays)))
