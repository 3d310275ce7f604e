"""What a worker saves a deployed client: ``python -m benchmarks.warm [--full]``.

A SuperLink and SuperNodes are processes on this machine; the client is that of ``examples/text_lora``, MiniLM with
LoRA, from packages alone. In one arm each message has its own process, as in Flower (``worker-idle`` 0); in the
other it is passed on to the node's worker. *Loading* is all that a ClientApp does except training: it imports the
app, torch, transformers and peft, and loads data, model and tokenizer, or calls a worker that has them. It does
not include the start of Flower's own process; the time of a round does.
"""

from __future__ import annotations

import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.deployment import Deployment
from benchmarks.harness import Bench, Row, parser, sources_digest
from fedkit.clients.worker import WORKER_IDLE

ROOT = Path(__file__).parents[1]
EXAMPLE, TIMED = ROOT / "examples" / "text_lora", ROOT / "tests" / "fixtures" / "timed_app"
HOUR: Final = 3600.0
ARMS: Final = {"a process per message": "0", "a worker per node": "600"}  # and its FEDKIT_WORKER_IDLE
COLUMNS = {
    "arm": "",
    "first": "loading, first message, s",
    "later": "later messages, s",
    "share": "of the cold start",
    "train": "training, s",
    "round": "a later round, s",
}


def timed_app(folder: Path) -> Path:
    """Return the example with a client and a server around it that take the time; `folder` must not exist."""
    app = shutil.copytree(EXAMPLE, folder)
    for path in TIMED.glob("*.py"):
        shutil.copy(path, app / "text_lora")
    project = app / "pyproject.toml"
    text = project.read_text()
    for side in ("client", "server"):
        text = text.replace(f"text_lora.{side}_app:app", f"text_lora.timed_{side}:app")
    project.write_text(text)
    return app


def measure(idle: str, *, nodes: int, rounds: int) -> Row:
    """Return the medians of an arm, over messages and rounds."""
    with tempfile.TemporaryDirectory(prefix="warm-") as name:
        folder = Path(name)
        with Deployment(folder / "deployment", nodes, settings={WORKER_IDLE: idle}) as deployment:
            config = {"num-clients": nodes, "num-rounds": rounds, "run-dir": name}
            deployment.run(timed_app(folder / "app"), config, HOUR)
        rows = [json.loads(line) for line in (folder / "times.jsonl").read_text().splitlines()]
    first, *later = ([loading(reply) for reply in row["replies"]] for row in rows)
    return {
        "first": statistics.median(first),
        "later": statistics.median(seconds for found in later for seconds in found),
        "train": statistics.median(reply["train-seconds"] for row in rows[1:] for reply in row["replies"]),
        "round": statistics.median(row["seconds"] for row in rows[1:]),
        "all": [first, *later],
    }


def loading(reply: Row) -> float:
    """Return the seconds that a ClientApp spent on everything but training."""
    return float(reply["import-seconds"] + reply["call-seconds"] - reply["train-seconds"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    bench = Bench("warm", parser(__doc__).parse_args(arguments))
    plan = {"nodes": 2, "rounds": 8 if bench.full else 3}
    code = sources_digest("fedkit", "clients", "examples/text_lora")
    rows = [bench.arm(name, partial(measure, idle, **plan), code=code, **plan) for name, idle in ARMS.items()]
    cold = statistics.median(seconds for found in rows[0]["all"] for seconds in found)
    title = (
        f"Seconds of a client but for its training, {plan['nodes']} nodes on one machine, {plan['rounds']} rounds"
    )
    bench.table(title, COLUMNS, [row | {"share": f"{row['later'] / cold:.1%}"} for row in rows])
    bench.finish()


if __name__ == "__main__":
    sys.exit(main())
