"""Clustering of many adapters: ``python -m benchmarks.clusters [--full]``.

TAC finds out which adapters are for the same task. Here an adapter is 75,000 values: those of its task, plus noise
three times as large. scikit-learn's KMeans, with the ten starts of FL-TAC's code, gets the adapters as one matrix,
as FL-TAC's code does; fedkit gets the same vectors one by one. A *round* is all of the server's work in
`Clustered`: frames of 4 bits are decoded, clustered, decoded again and averaged. Each arm runs in a process of its
own, whose resident memory is read from outside, frames and interpreter included; libraries are loaded before the
clock starts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.harness import Bench, Row, parser, sources_digest
from benchmarks.machine import status_bytes
from fedkit.aggregation.cluster import Clustered
from fedkit.aggregation.identities import adjusted_rand_index
from fedkit.aggregation.mean import Mean
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.aggregation.signatures import Signatures
from fedkit.aggregation.slots import join_clusters, join_slots
from fedkit.aggregation.tasks import Tasks
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.wire import Codec, open_frame

TASKS, VALUES, NOISE = 8, 75_000, 3.0
COLUMNS = {
    "arm": "arm",
    "adapters": "adapters",
    "cpu": "CPU seconds",
    "wall": "seconds",
    "peak": "peak memory, MB",
    "ari": "ARI with the true tasks",
}


def centres() -> NDArray[np.float32]:
    """Return the adapter of each task."""
    return np.random.default_rng(0).standard_normal((TASKS, VALUES), np.float32)


def adapters(count: int) -> Iterator[NDArray[np.float32]]:
    """Yield as many adapters, task after task in turn."""
    tasks = centres()
    for number in range(count):
        rng = np.random.default_rng(number + 1)
        yield tasks[number % TASKS] + np.float32(NOISE) * rng.standard_normal(VALUES, np.float32)


def truth(count: int) -> list[int]:
    """Return the task of each adapter."""
    return [number % TASKS for number in range(count)]


def scikit_learn(count: int, starts: int) -> Callable[[], Sequence[int]]:
    """Return what clusters all adapters with scikit-learn."""
    from sklearn.cluster import KMeans

    matrix = np.stack(list(adapters(count)))
    return lambda: list(map(int, KMeans(TASKS, n_init=starts, random_state=0).fit(matrix).labels_))


def vectors(count: int) -> Callable[[], Sequence[int]]:
    """Return what clusters all adapters with fedkit, given as vectors."""
    matrix, start = np.stack(list(adapters(count))), np.zeros(VALUES, np.float32)

    def run() -> Sequence[int]:
        signatures = Signatures()
        for row in (*[start] * TASKS, *matrix):
            signatures.add({"w": row})
        rows = signatures.rows()
        return Tasks(TASKS).label([str(i) for i in range(count)], rows[TASKS:], rows[:TASKS])

    return run


def round_of(count: int) -> Callable[[], Sequence[int]]:
    """Return what aggregates a round of coded adapters."""
    start = {"w": np.zeros(VALUES, np.float32)}
    like = join_slots([start])
    codec = Codec(ZeroMidTread(4, 4))
    frames = [codec.encode({"slot-0/w": row}) for row in adapters(count)]

    def opened(data: bytes) -> tuple[dict[str, NDArray[np.float32]], None]:
        return open_frame(data, like=like).arrays(), None

    def uploads() -> Iterator[Upload]:
        for number, data in enumerate(frames):
            arrays, again = opened(data)[0], partial(opened, data)
            yield Upload(number, f"{number}", 1.0, arrays, None, True, {}, len(data), bytes(16), again=again)

    def run() -> Sequence[int]:
        aggregator, params = Clustered(Tasks(TASKS), Mean()), join_clusters([start] * TASKS)
        cohort = Cohort(1, dict.fromkeys(range(count), like), {i: str(i) for i in range(count)})
        step = aggregator(params, cohort, uploads(), aggregator.init(params))
        return [step.state.assignment[str(i)][0] for i in range(count)]

    return run


WAYS: dict[str, Callable[..., Callable[[], Sequence[int]]]] = {
    "scikit-learn": scikit_learn,
    "vectors": vectors,
    "round": round_of,
}


def work(way: str, count: int, *options: int) -> Row:
    """Return what one arm takes, measured in this process."""
    import scipy.optimize  # noqa: F401  # as scikit-learn is

    run = WAYS[way](count, *options)
    cpu, wall = time.process_time(), time.perf_counter()
    labels = run()
    row: Row = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
    return row | {"ari": adjusted_rand_index({"": labels}, {"": truth(count)})}


def apart(way: str, count: int, *options: int) -> Row:
    """Return what one arm takes, in a process of its own, with the most memory that was seen of it from here."""
    command = [sys.executable, "-m", "benchmarks.clusters", "--work", json.dumps([way, count, *options])]
    process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True), 0
    while process.poll() is None:
        peak = max(peak, status_bytes("VmHWM", process.pid))
        time.sleep(0.05)
    text = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"{way}: the process ended with {process.returncode}.")
    return {**json.loads(text), "peak": peak / 1e6}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    arguments = parser(__doc__)
    arguments.add_argument("--work", help="measure one arm in this process, and print its row as JSON")
    options = arguments.parse_args(argv)
    if options.work:
        print(json.dumps(work(*json.loads(options.work))))
        return
    bench = Bench("clusters", options)
    few, many, starts = (1000, 10_000, 10) if bench.full else (100, 200, 1)
    code: dict[str, Any] = {"code": sources_digest("fedkit/aggregation", "fedkit/codec")}
    arms = {
        f"scikit-learn KMeans, {starts} starts": ("scikit-learn", few, starts),
        "fedkit, of vectors": ("vectors", few),
        "fedkit, a round of frames": ("round", many),
    }
    for name, (way, *numbers) in arms.items():
        own = {} if way == "scikit-learn" else code
        bench.arm(name, partial(apart, way, *numbers), adapters=numbers[0], **own)
    bench.table(f"adapters of {VALUES} values, {TASKS} tasks", COLUMNS, bench.rows)
    bench.finish()


if __name__ == "__main__":
    main()
