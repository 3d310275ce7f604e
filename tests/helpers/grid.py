"""An in-process Grid: real Flower messages, really serialised, milliseconds per round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

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
        raise NotImplementedError

    def pull_messages(self, message_ids):
        raise NotImplementedError

    def send_and_receive(self, messages, *, timeout=None) -> list[Message]:
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        node_id = message.metadata.dst_node_id
        received = inflate(*deflate(message))
        try:
            reply = self.apps[node_id](received, self.contexts[node_id])
        except Exception as error:  # as Flower does
            reply = Message(Error(CLIENT_APP_RAISED_EXCEPTION, repr(error)), reply_to=received)
        return inflate(*deflate(reply))
