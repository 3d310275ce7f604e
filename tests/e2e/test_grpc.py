"""What a SuperNode and a SuperLink say to each other is gRPC, and carries fedkit's frames and nothing larger."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from flwr.proto.fleet_pb2 import PullMessagesResponse  # noqa: F401  # registers the types below
from flwr.proto.message_pb2 import PullObjectResponse, PushObjectRequest

from benchmarks.deployment import Deployment
from fedkit.codec.frame import MAGIC, Header, read_header
from fedkit.codec.sections import FLOAT32, MASKED
from fedkit.flower import FLEET_IS_GRPC
from tests.helpers.grpc_relay import Call, Relay

APP = Path(__file__).parents[1] / "fixtures" / "wire_app"
CLIENTS, ROUNDS = 2, 2
KINDS = {  # run config, and whether the frames that arrive are quantized, and sparse
    "quantized": ({"uplink-bits": 1.0}, True, False),
    "sparse": ({"uplink-bits": 0.0, "density": 0.05}, False, True),
    "quantized-sparse": ({"uplink-bits": 2.0, "density": 0.05}, True, True),
}

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.skipif(not FLEET_IS_GRPC, reason="this Flower's SuperNodes speak HTTP"),
]


def test_every_kind_of_frame_travels_in_grpc_calls_that_the_ledger_accounts_for(tmp_path: Path) -> None:
    app = shutil.copytree(APP, tmp_path / "wire-app")
    with Deployment(tmp_path / "deployment", nodes=0) as deployment, Relay(deployment.fleet_port) as relay:
        deployment.fleet_port = relay.port
        for i in range(CLIENTS):
            deployment.connect_node(i)
        for kind, (config, quantized, sparse) in KINDS.items():
            relay.calls.clear()
            own = {"num-clients": CLIENTS, "num-rounds": ROUNDS, "run-dir": str(tmp_path / kind)}
            deployment.run(app, own | config)
            calls = list(relay.calls)
            frames = [header for call in calls if (header := frame_in(call))]
            assert len(frames) == CLIENTS * ROUNDS
            kinds = {(header.grid != FLOAT32, bool(header.flags & MASKED)) for header in frames}
            assert kinds == {(quantized, sparse)}, kind
            check_bytes(calls, tmp_path / kind / "ledger.jsonl")


def check_bytes(calls: list[Call], ledger: Path) -> None:
    """Compare the objects in gRPC calls with those in the ledger, and with all that the calls carried."""
    entries = [json.loads(line) for line in ledger.read_text().splitlines()]
    booked = {
        side: sum(entry["object-bytes"] for entry in entries if entry["direction"] == side)
        for side in ("uplink", "downlink")
    }
    assert {call.method.rpartition("/")[0] for call in calls} == {"/flwr.proto.Fleet"}
    pushed = sum(len(PushObjectRequest.FromString(c.request).object_content) for c in calls if of(c, "PushObject"))
    pulled = sum(
        len(PullObjectResponse.FromString(c.response).object_content) for c in calls if of(c, "PullObject")
    )
    assert pushed == booked["uplink"]
    assert pulled == booked["downlink"]


def of(call: Call, name: str) -> bool:
    return call.method == f"/flwr.proto.Fleet/{name}"


def frame_in(call: Call) -> Header | None:
    """Return the header of the frame that a call brings to the SuperLink, if it brings one."""
    if not of(call, "PushObject"):
        return None
    _, _, body = PushObjectRequest.FromString(call.request).object_content.partition(b"\0")
    return read_header(body) if body.startswith(MAGIC) else None
