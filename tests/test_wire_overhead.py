"""One Array per message, and hardly a byte besides its frame, both ways."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from fedkit.arrays import NamedArrays
from fedkit.clients import ErrorFeedbackMod
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.wire import Codec
from fedkit.flower import deflate, inflate, object_bytes
from fedkit.message import frame_record, from_arrays, read_frame
from fedkit.strategies import ErrorFeedback
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import client_app

BITS = EntropyConstrained(2.0)  # of 72,000 values: 18 kB


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"layer-{i}": rng.laplace(size=(80, 90)).astype(np.float32) for i in range(10)}


def second_round() -> tuple[Message, Message]:
    """The message and the reply of a round in which both sides send a change."""
    target: NamedArrays = values()
    grid = InProcessGrid([client_app([ErrorFeedbackMod()], target)])
    strategy = ErrorFeedback(
        quantizer=BITS, downlink=Codec(BITS), fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1
    )
    zeros = {name: np.zeros_like(array) for name, array in target.items()}
    arrays = from_arrays(strategy.downlink.begin(zeros))
    for server_round in (1, 2):
        (message,) = strategy.configure_train(server_round, arrays, ConfigRecord(), grid)
        (reply,) = grid.send_and_receive([message])
        arrays, _ = strategy.aggregate_train(server_round, [reply])
    return message, reply


@pytest.mark.parametrize("direction", ["downlink", "uplink"])
def test_a_message_is_one_array_and_costs_what_it_would_without_a_frame(direction):
    message = dict(zip(("downlink", "uplink"), second_round(), strict=True))[direction]
    (record,) = message.content.array_records.values()
    assert len(record) == 1
    frame = read_frame(message.content)
    assert 17_000 < len(frame) < 19_500
    empty = inflate(*deflate(message))
    (key,) = empty.content.array_records
    empty.content[key] = frame_record(b"")
    extra = object_bytes(message) - len(frame) - object_bytes(empty)
    assert abs(extra) <= 0.015 * len(frame)
