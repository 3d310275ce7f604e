"""Recordings of what clients would send: ``python -m benchmarks.innovations [--full]``.

The apps in `examples` run in this process, under AQUILA. What its mod is about to quantize is the innovation: the
client's update minus what the server has from it. There is one file for each recorded round and client; `load`
stacks clients until there are 75,000 values. Small: three rounds of the quickstart. Full: rounds 3, 10 and 20 of
the quickstart, and 1, 4, 8 and 12 of `text_lora`, on SST-2 from ``$FEDKIT_DATA_DIR/text/sst2`` or, if that is
missing, on the manuals' sentences.
"""

from __future__ import annotations

import os
import sys
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from benchmarks.harness import parser
from fedkit.arrays import num_values, subtract
from fedkit.clients import AquilaMod
from fedkit.clients.base import Coded, Job
from fedkit.flower import task_identity
from fedkit.memory import ClientMemory
from fedkit.strategies import Aquila

ROOT = Path(__file__).parents[1]
FOLDER = Path("benchmark-runs", "innovations")
PLAIN: dict[str, Any] = {"active-rank": 8, "orth-reg-weight": 0.0}  # LoRA, not RM-LoRA, for text
LEAST = 75_000  # values in what a codec is measured on


class Recording(NamedTuple):
    """One or more clients' innovations of the same round, stacked under ``client-i/``."""

    name: str
    update: dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Source:
    """An app, which of its rounds to record, and what to change in its run config."""

    name: str  # of the recordings
    app: str
    rounds: tuple[int, ...]
    config: dict[str, Any]


class Recorder(AquilaMod):
    """AQUILA's mod, and a file of each innovation."""

    def __init__(self, source: Source, folder: Path) -> None:
        self.source, self.folder = source, folder

    def code(self, update: dict[str, NDArray[np.float32]], job: Job) -> Coded:
        """Return what AQUILA sends; write what it quantizes."""
        if (server_round := job.instructions.server_round) in self.source.rounds:
            memory = ClientMemory(job.state, self.scheme, like=update)
            innovation = subtract(update, memory.settle(job.instructions.accepted))
            name = f"{self.source.name}_round{server_round}_client{job.client_id}.npz"
            np.savez(self.folder / name, allow_pickle=False, **innovation)
        return super().code(update, job)


def sources(full: bool) -> list[Source]:
    """Return what to record."""
    if not full:
        return [Source("quickstart", "quickstart", (1, 2, 3), {})]
    data = Path(os.environ.get("FEDKIT_DATA_DIR", ""), "text", "sst2")
    digits = Source("quickstart", "quickstart", (3, 10, 20), {})
    if not data.is_dir():
        return [digits, Source("manuals", "text_lora", (1, 4, 8, 12), PLAIN)]
    sst2 = PLAIN | {"data": str(data), "text-column": "text_a"}
    return [digits, Source("sst2", "text_lora", (1, 4, 8, 12), sst2)]


def record(source: Source, folder: Path = FOLDER) -> None:
    """Run an app in this process and write its innovations, unless the last round's are there."""
    folder.mkdir(parents=True, exist_ok=True)
    last = f"{source.name}_round{max(source.rounds)}_*.npz"
    if any(folder.glob(last)):
        return
    from tests.helpers.grid import InProcessGrid

    sys.path.insert(0, str(ROOT / "examples" / source.app))
    project = tomllib.loads((ROOT / "examples" / source.app / "pyproject.toml").read_text())
    config = {**project["tool"]["flwr"]["app"]["config"], "num-rounds": max(source.rounds), **source.config}
    app = ClientApp(mods=[Recorder(source, folder)])
    app.train()(import_module(f"{source.app}.client_app").train)
    clients = int(config["num-clients"])
    grid = InProcessGrid([app] * clients)
    for context in grid.contexts.values():
        context.run_config = dict(config)
    with task_identity(run_id=1, node_id=1):
        strategy = Aquila(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        strategy.start(grid, _initial(source.app, config), num_rounds=max(source.rounds))
    if not any(folder.glob(last)):
        raise RuntimeError(f"no client of {source.app} answered in the last round: see the log.")


def _initial(app: str, config: dict[str, Any]) -> Any:
    """Return the adapter that the app's server would start from."""
    from fedkit.clients.adapters import get_adapter
    from fedkit.config import parse
    from fedkit.message import from_arrays

    task = import_module(f"{app}.task")
    build = task.build_model if hasattr(task, "build_model") else import_module(f"{app}.model").build_model
    return from_arrays(get_adapter(build(parse(task.Config, config))))


def load(folder: Path, *, most: int | None = None, least: int = LEAST) -> Iterator[Recording]:
    """Yield stacks of at least `least` values, up to `most` for each app and round.

    Clients that are left over, too few for a stack, are not used.
    """
    rounds: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*_round*_client*.npz")):
        rounds.setdefault(path.name.rpartition("_client")[0], []).append(path)
    for name in sorted(rounds, key=lambda name: (name.split("_round")[0], int(name.split("_round")[1]))):
        stacks = list(_stacks(rounds[name], least))[:most]
        for number, stack in enumerate(stacks):
            yield Recording(f"{name} {number}", stack)


def _stacks(paths: Sequence[Path], least: int) -> Iterator[dict[str, NDArray[np.float32]]]:
    stack: dict[str, NDArray[np.float32]] = {}
    for path in paths:
        client = path.stem.rpartition("_")[2].replace("client", "client-")
        with np.load(path) as arrays:
            stack.update({f"{client}/{name}": arrays[name].astype(np.float32) for name in arrays.files})
        if num_values(stack) >= least:
            yield stack
            stack = {}


def main(argv: Sequence[str] | None = None) -> None:
    """Record, for the codecs to be measured on."""
    options = parser(__doc__).parse_args(argv)
    folder = Path(options.out, "innovations")
    for source in sources(options.full):
        record(source, folder)
    for recording in load(folder):
        print(recording.name, f"{num_values(recording.update):,} values in {len(recording.update)} arrays")


if __name__ == "__main__":
    main()
