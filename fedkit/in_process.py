"""A Grid whose nodes are ClientApps in this process: real, serialised messages at milliseconds per round."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import count

from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid

from fedkit.config import Scalar
from fedkit.flower import ClientAppCallable, deflate, inflate, raised


class InProcessGrid(Grid):
    """Runs the ClientApp of each message when its reply is pulled; scheduled faults are added by `RoundGrid`.

    Parameters
    ----------
    apps : sequence of callable
        The ClientApp of each node; node k has the id 1000 + k and the partition k.
    run_config : mapping, optional
        The run config in each node's Context.
    """

    def __init__(self, apps: Sequence[ClientAppCallable], run_config: Mapping[str, Scalar] | None = None) -> None:
        self.apps = {1000 + k: app for k, app in enumerate(apps)}
        self.contexts = {
            node_id: Context(
                run_id=1,
                node_id=node_id,
                node_config={"partition-id": k, "num-partitions": len(apps)},
                state=RecordDict(),
                run_config=dict(run_config or {}),
            )
            for k, node_id in enumerate(self.apps)
        }
        self.waiting: dict[str, Message] = {}
        self.numbers = count()

    def set_run(self, run: object) -> None:
        """There is none."""
        raise NotImplementedError

    @property
    def run(self):  # type: ignore[no-untyped-def]  # its type is private to Flower
        """There is none."""
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Not implemented: Flower's Grid has it only for old apps."""
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes."""
        return list(self.apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Keep messages until their replies are pulled; return their ids."""
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = f"message-{next(self.numbers)}"
            self.waiting[message_id] = message  # with its id, as Flower does
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies."""
        return [self.answer(self.waiting.pop(m)) for m in message_ids if m in self.waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and return all replies."""
        return list(self.pull_messages(self.push_messages(messages)))

    def restart(self, node_id: int) -> None:
        """Make a node lose what it holds in memory."""
        self.contexts[node_id].state = RecordDict()

    def answer(self, message: Message) -> Message:
        """Return a node's reply; message and reply pass through Flower's serialisation."""
        node_id, message_id = message.metadata.dst_node_id, message.metadata.message_id
        object_id, objects = deflate(message)
        received = inflate(object_id, objects, message_id=message_id)
        try:
            reply = self.apps[node_id](received, self.contexts[node_id])
        except Exception as error:  # as Flower does
            reply = raised(error, reply_to=received)
        return inflate(*deflate(reply))
