"""Random schedules: ``python -m benchmarks.schedules`` plays runs in which much goes wrong.

A schedule is drawn from its seed: clients and rounds, a strategy, limits, faults, clients that restart, forget,
come back under another name or are killed while they write, and a server that loses power, even in the middle of a
checkpoint. Real messages pass through an in-process grid on a simulated clock. After each round, clients and
server are compared with slow, obvious reference implementations (`tests.helpers.schedules`). Every schedule that
breaks an invariant is printed, and the exit status is 1; ``--seed N`` plays it again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.harness import sources_digest
from fedkit.flower import task_identity
from tests.helpers.schedules.run import play

FULL = 100_000  # schedules
BLOCK = 200  # of a line in the file of those that were played


@dataclass
class Tally:
    """What came of the schedules so far."""

    schedules: int = 0
    starts: int = 0  # of servers
    rounds: int = 0
    replies: int = 0  # after which a client was compared
    seconds: float = 0.0  # of one core
    failures: dict[int, str] = field(default_factory=dict)  # by seed

    def add(self, other: Tally) -> None:
        """Add what came of other schedules."""
        for name in ("schedules", "starts", "rounds", "replies", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.failures |= other.failures


def play_all(seeds: Iterable[int], seconds: float = float("inf")) -> Tally:
    """Return what came of schedules; of those that begin before so many seconds have passed."""
    tally, start = Tally(), time.monotonic()
    with task_identity(run_id=1, node_id=1):
        for seed in seeds:
            if time.monotonic() - start > seconds:
                break
            try:
                run = play(seed)
            except Exception as error:
                tally.failures[seed] = f"{type(error).__name__}: {error}"
            else:
                tally.starts += run.starts
                tally.rounds += run.rounds
                tally.replies += run.world.checks
            tally.schedules += 1
    tally.seconds = time.monotonic() - start
    return tally


def _block(first: int) -> tuple[int, Tally]:
    return first, play_all(range(first, first + BLOCK))


def play_full(path: Path, count: int, processes: int) -> Iterator[Tally]:
    """Yield the tally after each block of `count` schedules; those in the file are not played again."""
    total, done, key = Tally(), set(), sources_digest("fedkit", "strategies", "clients", "tests/helpers")
    path.parent.mkdir(parents=True, exist_ok=True)
    for line in map(json.loads, path.read_text().splitlines() if path.exists() else []):
        if line.pop("sources") == key and line["first"] not in done:
            done.add(line.pop("first"))
            failures = {int(seed): what for seed, what in line.pop("failures").items()}
            total.add(Tally(**line, failures=failures))
    yield total
    left = [first for first in range(0, count, BLOCK) if first not in done]
    with multiprocessing.get_context("spawn").Pool(processes) as pool, path.open("a") as file:
        for first, tally in pool.imap_unordered(_block, left):
            file.write(json.dumps({"sources": key, "first": first, **vars(tally)}) + "\n")
            file.flush()
            total.add(tally)
            yield total


def again(seed: int) -> int:
    """Play one schedule; print what it is, and where it fails."""
    from tests.helpers.schedules.plan import draw

    print(draw(seed))
    try:
        with task_identity(run_id=1, node_id=1):
            play(seed)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def report(tally: Tally) -> None:
    """Print the counts, and the seeds of failures."""
    for name in ("schedules", "starts", "rounds", "replies"):
        print(f"{getattr(tally, name):>9,}  {name}")
    print(f"{1e3 * tally.seconds / max(1, tally.schedules):>9.1f}  ms of one core for each schedule")
    print(f"{len(tally.failures):>9,}  failures")
    for what, times in Counter(what.rstrip("0123456789.e-") for what in tally.failures.values()).most_common(20):
        print(f"{times:>9,}  {what}", file=sys.stderr)
    for seed, what in sorted(tally.failures.items()):
        print(f"--seed {seed}: {what}", file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    """Run, print the counts, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.schedules", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--full", action="store_true", help=f"{FULL:,} schedules; continues when repeated")
    parser.add_argument("--count", type=int, default=FULL, help="how many, with --full (%(default)s)")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--seed", type=int, help="play this schedule alone")
    parser.add_argument(
        "--out", metavar="DIR", default="benchmark-runs", help="where --full goes on (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.seed is not None:
        return again(options.seed)
    if not options.full:
        tally = play_all(range(FULL), options.seconds)
    else:
        said: set[int] = set()
        for tally in play_full(Path(options.out, "schedules.jsonl"), options.count, options.processes):
            for seed in sorted(tally.failures.keys() - said):
                print(f"--seed {seed}: {tally.failures[seed]}", file=sys.stderr, flush=True)
            said |= tally.failures.keys()
            if tally.schedules % (25 * BLOCK) == 0:
                print(f"{tally.schedules:,} schedules, {len(tally.failures)} failures", flush=True)
    report(tally)
    return int(bool(tally.failures))


if __name__ == "__main__":
    sys.exit(main())
