"""An in-process Grid: real Flower messages, really serialised, milliseconds per round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import count

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedkit.flower import deflate, inflate

CLIENT_APP_RAISED_EXCEPTION = 2


class InProcessGrid(Grid):
    """Runs each message's ClientApp at once; what fails is lost or wrapped outside, by `RoundGrid`."""

    def __init__(self, apps: Sequence[ClientApp]) -> None:
        self.apps = {1000 + i: app for i, app in enumerate(apps)}
        self.contexts = {
            node_id: Context(
                run_id=1, node_id=node_id, node_config={"partition-id": i}, state=RecordDict(), run_config={}
            )
            for i, node_id in enumerate(self.apps)
        }

        self.waiting: dict[str, Message] = {}
        self.numbers = count()

    def set_run(self, run):
        raise NotImplementedError

    @property
    def run(self):
        raise NotImplementedError

    def create_message(self, content, message_type, dst_node_id, group_id, ttl=None):
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.apps)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = message_id = (
                f"message-{next(self.numbers)}"  # as Flower does
            )
            self.waiting[message_id] = message
            ids.append(message_id)
        return ids

    def pull_messages(self, message_ids):
        return [self._answer(self.waiting.pop(m)) for m in message_ids if m in self.waiting]

    def send_and_receive(self, messages, *, timeout=None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def restart(self, node_id: int) -> None:
        """Let a node lose what it holds in memory."""
        self.contexts[node_id].state = RecordDict()

    def _answer(self, message: Message) -> Message:
        node_id, message_id = message.metadata.dst_node_id, message.metadata.message_id
        received = inflate(*deflate(message))
        received.metadata.__dict__["_message_id"] = message_id
        try:
            reply = self.apps[node_id](received, self.contexts[node_id])
        except Exception as error:  # as Flower does
            reply = Message(Error(CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=received)
        return inflate(*deflate(reply))


class VirtualTime:
    """A clock that sleeping moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
