"""One client: receive the adapter, train it on the own sentences, reply."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod, TacMod, WarmWorker, kept
from fedkit.config import parse
from fedkit.message import from_arrays, to_arrays
from text_lora import task

# In a deployment a worker keeps what is loaded; of the others, each acts on the messages of its own strategy.
app = ClientApp(mods=[WarmWorker(__file__), AquilaMod(), ErrorFeedbackMod(), SafariMod(), TacMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the adapter after `local-steps` steps on this client's sentences."""
    # Here rather than above: importing torch takes seconds, which a refused message should not cost.
    import torch

    from fedkit.clients.adapters import get_adapter, set_adapter
    from text_lora.model import build_model

    torch.set_num_threads(1)  # the clients of a simulation share the cores
    config = parse(task.Config, context.run_config)
    partition_id = context.node_config["partition-id"]
    server_round = message.content.config_records["config"]["server-round"]

    rows = kept(task.load_partition, config, partition_id)
    model = kept(build_model, config)
    set_adapter(model, to_arrays(message.content.array_records["arrays"]))
    metrics = task.train(model, rows, config, seed=task.local_seed(config, server_round, partition_id))

    return Message(
        RecordDict(
            {
                "arrays": from_arrays(get_adapter(model)),
                "metrics": MetricRecord({"num-examples": len(rows), **metrics}),
            }
        ),
        reply_to=message,
    )
