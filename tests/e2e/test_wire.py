"""The ledger explains the kernel's count of the fleet port, in a deployment of processes that talk gRPC."""

import json
import shutil

import pytest

from benchmarks import wire

pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("ss") is None, reason="no program `ss` (iproute2, Linux) to count bytes by"),
]


def test_objects_and_their_calls_are_what_the_port_carried(tmp_path):
    found = wire.measure(tmp_path, rounds=4, uplink=1.0, downlink=2.0, idle_seconds=20.0)
    assert len(found.entries) == 2 * 2 * 4
    assert all(entry.frame_bytes > 9_000 for entry in found.entries if entry.direction == "uplink")
    for row in found.rows():
        assert row["explained"] == pytest.approx(row["socket"], rel=0.03), row
    rounds = [json.loads(line) for line in (tmp_path / "rounds.jsonl").read_text().splitlines()]
    for side, direction in enumerate(("uplink", "downlink")):
        during = [line[f"socket-{direction}-bytes"] for line in rounds[1:]]
        assert min(during) > 10_000
        assert sum(during) <= found.socket[side]
    assert max(found.per_second) < 1_000
