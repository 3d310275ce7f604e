"""The time of a round, compared with FedAvg on the same arrays: ``python -m benchmarks.round_time [--full]``.

A SuperLink and four SuperNodes are processes on this machine. One ServerApp lets the strategies take turns, in an
order that changes: a round of FedAvg, one of Aquila, and so on. Clients add noise and do not import torch, so that
what remains is Flower and fedkit. FedAvg is entirely Flower's own; in a second arm it waits for replies with
fedkit's grid. With ``--full`` there is also the quickstart's real training, with turns run by run.

Where the time goes is read from the log of the node whose reply was complete last:

- *send*: the server makes the messages and passes them to the SuperLink, until that is done or the node begins
- *poll*: until the node asks for messages, which it does 3 seconds after the last answer
- *pull*: the node fetches the message's objects, each with its own call
- *app*: a new process runs the ClientApp; noticed up to 0.1 s late (1 s by default), its end up to 0.5 s late
- *push*: the node sends the reply's objects, each with its own call
- *collect*: the server notices, which Flower's grid does every 3 seconds, fetches all replies and aggregates
"""

from __future__ import annotations

import json
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from benchmarks.deployment import Deployment, node_name
from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.report import read_rounds

ROOT = Path(__file__).parents[1]
APP, QUICKSTART = ROOT / "tests" / "fixtures" / "round_app", ROOT / "examples" / "quickstart"
NODES, HOUR = 4, 3600.0
BASELINE = "FedAvg"
PARTS = ("send", "poll", "pull", "app", "push", "collect")
SIZES = {"the quickstart's adapter": (34, 96), "400 tensors": (400, 24)}  # arrays, and the width of their layers
QUIET = {"FLWR_LOG_LEVEL": "INFO"}
COLUMNS = {"arm": "strategy", "rounds": "rounds", "seconds": "seconds", "ratio": "× FedAvg", "range": "quartiles"}

_LINE = re.compile(r"(?m)^INFO (\S+ \S+):\s+(Receiving|Received|Sending|Sent)\b.*?(?:\(ID: (\w+)\))?$")


def measure(folder: Path, *, tensors: int, width: int, rounds: int) -> list[Row]:
    """Return a row for each strategy: the median time of its rounds, and of their parts, in seconds."""
    app = shutil.copytree(APP, folder / "round-app")
    with Deployment(folder / "deployment", nodes=0, settings=QUIET) as deployment:
        for i in range(NODES):
            deployment.connect_node(i, FLWR_LOG_LEVEL="DEBUG")  # with the time in each line
        sizes = {"num-clients": NODES, "num-rounds": rounds, "tensors": tensors, "width": width}
        deployment.run(app, sizes | {"run-dir": str(folder)}, HOUR)
        stamps = dict(item for i in range(NODES) for item in stamps_of(deployment.text(node_name(i))))
    times: dict[str, list[Row]] = {BASELINE: []}
    for line in (folder / "times.jsonl").read_text().splitlines():
        found = json.loads(line)
        times.setdefault(found["arm"], []).append(parts_of(found, stamps))
    return [row_of(name, found, times[BASELINE]) for name, found in times.items()]


def stamps_of(log: str) -> Iterator[tuple[str, list[float]]]:
    """Yield, for each message a node received, its id and when it was received and answered: four moments."""
    moments: list[float] = []
    message_id = ""
    for stamp, event, identity in _LINE.findall(log):
        if event == "Receiving":
            moments, message_id = [], identity
        moments.append(datetime.strptime(stamp, "%Y-%m-%d %H:%M:%S,%f").timestamp())
        if event == "Sent":
            yield message_id, moments


def parts_of(found: Row, stamps: Mapping[str, list[float]]) -> Row:
    """Return the seconds of a round and of its parts, seen from the node whose reply was complete last."""
    last = max((stamps[message_id] for message_id in found["ids"]), key=lambda moments: moments[-1])
    sent = min(found["sent"], last[0])  # nodes begin to receive while objects are still being sent
    moments = [found["begun"], sent, *last, found["ended"]]
    parts = {part: end - start for part, (start, end) in zip(PARTS, pairwise(moments), strict=True)}
    return {"seconds": found["ended"] - found["begun"], **parts}


def row_of(name: str, found: Sequence[Row], baseline: Sequence[Row]) -> Row:
    """Return the medians of some rounds."""
    medians = {key: statistics.median(row[key] for row in found) for key in found[0]}
    ratio = medians["seconds"] / statistics.median(row["seconds"] for row in baseline)
    times = sorted(row["seconds"] for row in found)
    quartiles = [times[len(times) // 4], times[-1 - len(times) // 4]]
    return {"arm": name, "rounds": len(found), **medians, "ratio": ratio, "quartiles": quartiles}


def train(folder: Path, *, runs: int, rounds: int) -> list[Row]:
    """Return a row for each strategy: the median time of a round of the quickstart, with its evaluation."""
    names = {"fedavg": BASELINE, "aquila": "Aquila", "error-feedback": "ErrorFeedback"}
    times: dict[str, list[Row]] = {name: [] for name in names.values()}
    with Deployment(folder / "deployment", nodes=NODES, settings=QUIET) as deployment:
        for number in range(runs):
            order = list(names.items())
            for strategy, name in order if number % 2 else reversed(order):
                run_dir = folder / f"{strategy}-{number}"
                config = {"strategy": strategy, "num-clients": NODES, "num-rounds": rounds}
                deployment.run(QUICKSTART, config | {"run-dir": str(run_dir)}, HOUR)
                seconds = [row["seconds"] for row in read_rounds(run_dir / "rounds.jsonl")]
                times[name] += [{"seconds": b - a} for a, b in pairwise(seconds)]
    return [row_of(name, found, times[BASELINE]) for name, found in times.items()]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    bench = Bench("round_time", parser(__doc__).parse_args(argv))
    code = sources_digest("fedkit", "strategies", "clients")
    rounds = 12 if bench.full else 2
    sizes = SIZES if bench.full else dict(list(SIZES.items())[:1])
    for name, (tensors, width) in sizes.items():
        plan = {"tensors": tensors, "width": width, "rounds": rounds}

        def run(plan: Row = plan) -> Row:
            with tempfile.TemporaryDirectory(prefix="round-") as folder:
                return {"arms": measure(Path(folder), **plan)}

        show(bench, f"Seconds of a round with {NODES} nodes: {name}", bench.arm(name, run, code=code, **plan))
    if bench.full:
        plan = {"runs": 3, "rounds": 5}

        def run_training() -> Row:
            with tempfile.TemporaryDirectory(prefix="round-") as folder:
                return {"arms": train(Path(folder), **plan)}

        row = bench.arm("real training", run_training, code=code, **plan)
        show(bench, f"Seconds of a round with {NODES} nodes: the quickstart, trained", row)
    bench.finish()


def show(bench: Bench, title: str, row: Row) -> None:
    """Print the strategies of an arm."""
    rows = [arm | {"range": "{:.1f} to {:.1f}".format(*arm["quartiles"])} for arm in row["arms"]]
    columns = COLUMNS | {part: part for part in PARTS if part in rows[0]}
    bench.table(title, columns, rows)


if __name__ == "__main__":
    main()
