"""One client: receive the adapter, train it on the own images, reply."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod, TacMod, WarmWorker, kept
from fedkit.config import parse
from fedkit.message import from_arrays, rows_of, run_config_of, to_arrays
from vision import task

# In a deployment a worker keeps what is loaded; of the others, each acts on the messages of its own strategy.
app = ClientApp(mods=[WarmWorker(__file__), AquilaMod(), ErrorFeedbackMod(), SafariMod(), TacMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the adapter after `local-steps` steps on this client's images."""
    # Here rather than above: importing torch takes seconds, which a refused message should not cost.
    import torch

    from fedkit.clients.adapters import get_adapter, set_adapter
    from fedkit.clients.profiles import Profile
    from vision.data import load_partition
    from vision.model import load_model

    torch.set_num_threads(1)  # the clients of a simulation share the cores
    config, profile = parse(task.Config, run_config_of(message, context)), Profile.of(context)
    partition_id = context.node_config["partition-id"]
    server_round = message.content.config_records["config"]["server-round"]

    images = kept(load_partition, config, partition_id)
    model = kept(load_model, config, profile)
    set_adapter(model, to_arrays(message.content.array_records["arrays"]))
    seed = task.local_seed(config, server_round, partition_id)
    metrics = task.train(model, images, config, seed=seed, profile=profile, draw=rows_of(message))

    return Message(
        RecordDict(
            {
                "arrays": from_arrays(get_adapter(model)),
                "metrics": MetricRecord({"num-examples": len(images), **metrics}),
            }
        ),
        reply_to=message,
    )
