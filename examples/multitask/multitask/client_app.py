"""One client: receive an adapter for each of its tasks, train each on its task's images, reply with all."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.clients import TacMod, WarmWorker, kept
from fedkit.clients.tac import join_slots, split_slots
from fedkit.config import parse
from fedkit.message import from_arrays, to_arrays
from multitask import task

# In a deployment a worker keeps what is loaded.
app = ClientApp(mods=[WarmWorker(__file__), TacMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the adapters after `local-steps` steps each."""
    # Here rather than above: importing torch takes seconds, which a refused message should not cost.
    import torch

    from fedkit.clients.adapters import get_adapter, set_adapter

    torch.set_num_threads(1)  # the clients of a simulation share the cores
    config = parse(task.Config, context.run_config)
    partition_id = context.node_config["partition-id"]
    server_round = message.content.config_records["config"]["server-round"]

    slots = kept(task.load_slots, config, partition_id)
    received = split_slots(to_arrays(message.content.array_records["arrays"]), len(slots))
    model, trained, losses = kept(task.build_model, config), [], []
    for number, (slot, adapter) in enumerate(zip(slots, received, strict=True)):
        set_adapter(model, adapter)
        seed = task.local_seed(config, server_round, partition_id, number)
        losses.append(task.train(model, slot, config, seed=seed))
        trained.append(get_adapter(model))

    metrics = {"num-examples": sum(len(s.labels) for s in slots), "train-loss": sum(losses) / len(losses)}
    return Message(
        RecordDict({"arrays": from_arrays(join_slots(trained)), "metrics": MetricRecord(metrics)}),
        reply_to=message,
    )
