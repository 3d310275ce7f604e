"""One client: receive an adapter for each of its tasks, train each on its task's images, reply with all."""

from functools import partial

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.clients import TacMod, WarmWorker, kept
from fedkit.config import parse
from fedkit.message import from_arrays, run_config_of, to_arrays
from multitask import task

# In a deployment a worker keeps what is loaded.
app = ClientApp(mods=[WarmWorker(__file__), TacMod()])


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the adapters after `local-steps` steps each."""
    # Here rather than above: importing torch takes seconds, which a refused message should not cost.
    import torch

    from fedkit.clients.features import Features
    from fedkit.clients.slots import train_slots

    torch.set_num_threads(1)  # the clients of a simulation share the cores
    config = parse(task.Config, run_config_of(message, context))
    partition_id = context.node_config["partition-id"]
    server_round = message.content.config_records["config"]["server-round"]

    slots = kept(task.load_slots, config, partition_id)
    received = to_arrays(message.content.array_records["arrays"])
    seeds = [task.local_seed(config, server_round, partition_id, number) for number in range(len(slots))]
    trainings = [
        partial(task.train, slot=slot, config=config, seed=seed) for slot, seed in zip(slots, seeds, strict=True)
    ]
    features = Features(message)
    trained, losses = train_slots(kept(task.build_model, config), received, trainings, features)

    metrics = {"num-examples": sum(len(slot.examples) for slot in slots), "train-loss": sum(losses) / len(losses)}
    content = RecordDict({"arrays": from_arrays(trained), "metrics": MetricRecord(metrics)})
    features.write(content)
    return Message(content, reply_to=message)
