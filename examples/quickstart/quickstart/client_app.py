"""One client: receive the adapter, train it on the own images, reply."""

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod, TacMod, WarmWorker, kept
from fedkit.config import parse
from fedkit.message import from_arrays, rows_of, run_config_of, to_arrays
from quickstart import task

# In a deployment a worker keeps what is loaded; of the others, each acts on the messages of its own strategy.
app = ClientApp(mods=[WarmWorker(__file__), AquilaMod(), ErrorFeedbackMod(), SafariMod(), TacMod()])


@app.query()
def begin(message: Message, context: Context) -> Message:
    """Return the fresh adapter, for a server without torch; all clients would return the same."""
    return task.initial_adapter(parse(task.Config, context.run_config)).reply(message)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the adapter after `local-epochs` passes over this client's images."""
    # Here rather than above: importing torch takes seconds, which a refused message should not cost.
    import torch

    from fedkit.clients.adapters import get_adapter, set_adapter
    from fedkit.clients.profiles import Profile

    torch.set_num_threads(1)  # the clients of a simulation share the cores
    config, profile = parse(task.Config, run_config_of(message, context)), Profile.of(context)
    partition_id = context.node_config["partition-id"]
    server_round = message.content.config_records["config"]["server-round"]

    images, labels = kept(task.load_partition, config, partition_id)
    model = kept(task.load_model, config, profile)
    set_adapter(model, to_arrays(message.content.array_records["arrays"]))
    seed = task.local_seed(config, server_round, partition_id)
    metrics = task.train(model, images, labels, config, seed=seed, rows=rows_of(message), profile=profile)

    arrays, metrics = from_arrays(get_adapter(model)), MetricRecord({"num-examples": len(labels), **metrics})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Return how well the adapter does on this client's share of the test images, for a server without torch."""
    import torch

    torch.set_num_threads(1)
    config = parse(task.Config, context.run_config)
    share = slice(context.node_config["partition-id"], None, config.num_clients)
    metrics = kept(task.evaluator, config, share)(to_arrays(message.content.array_records["arrays"]))
    metrics = MetricRecord({"num-examples": len(range(task.NUM_TEST)[share]), **metrics})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
