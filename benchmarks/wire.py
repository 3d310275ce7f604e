"""The ledger compared with the kernel's count of the fleet port: ``python -m benchmarks.wire [--full]``.

A SuperLink and two SuperNodes are processes that talk gRPC over loopback; 75,000 parameters with error feedback
both ways. The traffic of the port is explained by the ledger's messages (`fedkit.ledger`), by the calls of idle
nodes (measured before the run, when there are no others; the SuperLink's log tells how often they come), and by
the app's bundle, which each node fetches once. The rest is an error, as a share of the traffic.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from benchmarks.deployment import SUPERLINK, Deployment
from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.entry import Entry
from fedkit.processes import program
from fedkit.sockets import SocketMeter, Traffic

APP = Path(__file__).parents[1] / "tests" / "fixtures" / "wire_app"
IDLE_CALLS = ("[Fleet.PullMessages] node_id", "[Fleet.SendNodeHeartbeat]")
COLUMNS = {
    "direction": "direction",
    "frames": "frames",
    "objects": "objects",
    "ledger": "with calls",
    "idle": "idle in the run",
    "bundle": "app bundle",
    "explained": "sum",
    "socket": "socket",
    "error": "error",
}


@dataclass(frozen=True)
class Found:
    """What one run carried; traffic is seen from the SuperLink."""

    entries: list[Entry]
    socket: Traffic
    call: Traffic  # one idle call
    idle: Traffic  # idle calls during the run
    per_second: tuple[float, float]  # of one idle node, received and sent
    bundle: Traffic

    def rows(self) -> list[Row]:
        """Return a row for each direction."""
        return [self._row(*side) for side in (("uplink", 0), ("downlink", 1))]

    def _row(self, direction: str, side: int) -> Row:
        mine = [entry for entry in self.entries if entry.direction == direction]
        ledger = sum(entry.socket()[side] for entry in self.entries)
        explained = ledger + self.idle[side] + self.bundle[side]
        return {
            "direction": direction,
            "frames": sum(entry.frame_bytes for entry in mine),
            "objects": sum(entry.object_bytes for entry in mine),
            "ledger": ledger,
            "idle": self.idle[side],
            "bundle": self.bundle[side],
            "explained": explained,
            "socket": self.socket[side],
            "error": explained / self.socket[side] - 1,
            "call": self.call[side],
            "idle per second and node": self.per_second[side],
        }


def measure(folder: Path, *, rounds: int, uplink: float, downlink: float, idle_seconds: float) -> Found:
    """Return what a run of so many rounds, at so many bits per parameter, carried."""
    app = shutil.copytree(APP, folder / "wire-app")
    bundle = bundle_bytes(app, folder)
    with Deployment(folder / "deployment") as deployment:
        meter = SocketMeter(deployment.fleet_port)
        before, calls_before, began = _settled(meter), _idle_calls(deployment), time.monotonic()
        time.sleep(idle_seconds)
        start, calls_start, seconds = _settled(meter), _idle_calls(deployment), time.monotonic() - began
        config = {"num-rounds": rounds, "uplink-bits": uplink, "downlink-bits": downlink}
        deployment.run(app, config | {"fleet-port": deployment.fleet_port, "run-dir": str(folder)})
        end, calls_end = _settled(meter), _idle_calls(deployment)
        nodes = deployment.nodes
    entries = entries_of(folder / "ledger.jsonl")
    silent, count = start.since(before), calls_start - calls_before
    call = Traffic(round(silent.received / count), round(silent.sent / count))
    polls = calls_end - calls_start - sum(entry.direction == "downlink" for entry in entries)
    return Found(
        entries,
        end.since(start),
        call,
        Traffic(polls * call.received, polls * call.sent),
        (silent.received / seconds / nodes, silent.sent / seconds / nodes),
        Traffic(2 * nodes * call.received, nodes * (2 * call.sent + bundle)),  # GetRun and GetFab
    )


def bundle_bytes(app: Path, folder: Path) -> int:
    """Return the size of what a node fetches to run an app."""
    subprocess.run([program("flwr"), "build", "--app", str(app)], cwd=folder, check=True, capture_output=True)
    (path,) = folder.glob("*.fab")
    return path.stat().st_size


def entries_of(path: Path) -> list[Entry]:
    """Return the messages of a ``ledger.jsonl``."""
    names = [field.name for field in fields(Entry)]
    lines = map(json.loads, path.read_text().splitlines())
    return [Entry(**{name: line[name.replace("_", "-")] for name in names}) for line in lines]


def _idle_calls(deployment: Deployment) -> int:
    return sum(deployment.count(text, SUPERLINK) for text in IDLE_CALLS)


def _settled(meter: SocketMeter) -> Traffic:
    """Return a reading that no call is in the middle of: two that agree, a moment apart."""
    reading = meter.read()
    while True:
        time.sleep(0.4)
        again = meter.read()
        if again == reading:
            return again
        reading = again


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    bench = Bench("wire", parser(__doc__).parse_args(argv))
    code = sources_digest("fedkit", "strategies", "clients")
    rates = [(1.0, 1.0), (2.0, 2.0), (0.25, 0.5)] if bench.full else [(1.0, 1.0)]
    length = {"rounds": 10, "idle_seconds": 60.0} if bench.full else {"rounds": 4, "idle_seconds": 30.0}
    for uplink, downlink in rates:
        plan = length | {"uplink": uplink, "downlink": downlink}

        def run(plan: Row = plan) -> Row:
            with tempfile.TemporaryDirectory(prefix="wire-") as folder:
                return {"sides": measure(Path(folder), **plan).rows()}

        row = bench.arm("two nodes", run, code=code, **plan)
        title = f"Bytes of {plan['rounds']} rounds with two nodes, {uplink} bits per value up and {downlink} down"
        bench.table(title, COLUMNS, row["sides"])
        for side in row["sides"]:
            text = "{direction}: an idle node {idle per second and node:.0f} bytes/s, {call} a call"
            bench.console.print(text.format(**side), highlight=False)
    bench.finish()


if __name__ == "__main__":
    main()
