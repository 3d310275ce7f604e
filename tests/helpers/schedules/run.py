"""Runs a schedule, and compares every round with its twins."""

from __future__ import annotations

import ast
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from flwr.app import Message, MessageType, MetricRecord
from flwr.serverapp.strategy import Result

import fedkit.aggregation.memories
import fedkit.checkpoint
import fedkit.ledger
import fedkit.state
from fedkit.aggregation.memories import Memories
from fedkit.arrays import NamedArrays, flatten
from fedkit.errors import CrashError, QuorumError
from fedkit.flower import GridWrapper, is_unavailable
from fedkit.message import read_instructions, read_report, to_arrays
from fedkit.rounds import RoundGrid
from tests.helpers.grid import VirtualTime
from tests.helpers.quadratic import initial
from tests.helpers.schedules.clients import Clients, Vector, check
from tests.helpers.schedules.plan import TIMEOUT, Plan, draw
from tests.helpers.schedules.server import Server
from tests.helpers.schedules.world import PowerCut, World

TOLERANCE = 1e-6  # of what the mean may be wrong, relative to the parameters


@dataclass
class Way:
    """A message on its way."""

    node_id: int
    train: bool  # else it is to evaluate, or to say who it is
    expires: float


class Watch(GridWrapper):
    """What really passes between a RoundGrid and its Grid, faults included."""

    def __init__(self, inner: Any, world: World, watched: Watched) -> None:
        super().__init__(inner)
        self.world, self.watched = world, watched

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Check that no second message goes to a node."""
        messages = list(messages)
        if self.world.tick():
            raise PowerCut
        nodes = [message.metadata.dst_node_id for message in messages]
        check(len(set(nodes)) == len(nodes), "two messages to one node at once")
        busy = {way.node_id for way in self.watched.ways.values()}
        check(not busy & set(nodes), "a second message to a node that has not answered")
        ids = list(super().push_messages(messages))
        self.watched.pushed(ids, messages)
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Take note of what came."""
        replies = list(super().pull_messages(message_ids))
        self.watched.pulled(replies)
        if replies and self.world.tick():
            raise PowerCut
        return replies


class Watched(RoundGrid):
    """A RoundGrid whose every answer is compared with what it must be."""

    def __init__(self, world: World, plan: Plan, server: Server) -> None:
        super().__init__(world, limits=plan.limits, faults=plan.faults, clock=world.clock)
        self.inner = Watch(self.inner, world, self)
        self.server, self.world = server, world
        self.ways: dict[str, Way] = {}
        self.mine: set[str] = set()  # the messages of this call
        self.answers: list[Message] = []
        self.late: list[Message] = []
        self.chosen = False

    def get_node_ids(self) -> Iterable[int]:
        """Return the connected nodes, of which some are about to be chosen."""
        self.chosen = False
        return super().get_node_ids()

    def owing(self) -> set[int]:
        """Take note of who was alive, the first time that this is asked for a choice."""
        if not self.chosen:
            self.server.alive = set(super().get_node_ids()) - {way.node_id for way in self.ways.values()}
        self.chosen = True
        return super().owing()

    def pushed(self, ids: list[str], messages: list[Message]) -> None:
        """Take note of messages that were sent."""
        for message_id, message in zip(ids, messages, strict=True):
            meta = message.metadata
            expires = self.clock.monotonic() + (self.limits.deadline or TIMEOUT)
            train = meta.message_type == MessageType.TRAIN and not read_instructions(message).introduce
            self.ways[message_id] = Way(meta.dst_node_id, train, expires)
            self.mine.add(message_id)
            accepted = read_instructions(message).accepted
            self.server.told[meta.dst_node_id] = self.server.clients.histories[accepted]

    def pulled(self, replies: list[Message]) -> None:
        """Sort replies: each counts once, in its round or late."""
        for reply in replies:
            way = self.ways.pop(reply.metadata.reply_to_message_id, None)
            if way is None or is_unavailable(reply):
                continue
            if reply.metadata.reply_to_message_id in self.mine:
                self.answers.append(reply)
            elif reply.has_content() and way.train and self.limits.late == "use":
                self.late.append(reply)

    def _expire(self) -> None:
        super()._expire()
        now = self.clock.monotonic()
        self.ways = {key: way for key, way in self.ways.items() if way.expires > now}

    def ask(self, messages: Any, *, timeout: float) -> list[Message]:
        """Compare the answers to the question who nodes are."""
        self.mine, self.answers = set(), []
        replies = super().ask(messages, timeout=timeout)
        check(_same(replies, self.answers), "other answers than came")
        for reply in replies:
            if reply.has_content():
                node_id, client = reply.metadata.src_node_id, read_report(reply.content).client_id
                if self.server.is_free(client, node_id):
                    self.server.meet(node_id, client)
        return replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Compare the replies of a round."""
        messages = list(messages)
        self.mine, self.answers, start = set(), [], self.clock.monotonic()
        try:
            replies = list(super().send_and_receive(messages, timeout=timeout))
        except QuorumError:
            check(not self._expected(messages), "an error, though enough nodes answered")
            raise
        check(_same(replies, self._expected(messages)), "other replies than came in time")
        check(self.clock.monotonic() <= start + (self.limits.deadline or TIMEOUT) + 1, "a round without end")
        return replies

    def _expected(self, messages: list[Message]) -> list[Message]:
        if not messages or messages[0].metadata.message_type != MessageType.TRAIN:
            return self.answers
        late, self.late = self.late, []
        good = sum(reply.has_content() for reply in self.answers) + len(late)
        return [*self.answers, *late] if good >= self.limits.needed(len(messages)) else []


def _same(a: list[Message], b: list[Message]) -> bool:
    return [id(reply) for reply in a] == [id(reply) for reply in b]


@dataclass
class Run:
    """One schedule under way."""

    plan: Plan
    folder: Path
    clock: VirtualTime = field(default_factory=VirtualTime)
    starts: int = 0
    rounds: int = 0

    def __post_init__(self) -> None:
        self.clients = Clients(self.plan.scheme)
        self.world = World(self.plan, self.folder, self.clock, self.clients)
        self.server = Server(self.plan, self.clients)
        self.checkpoint = self.folder / "server"

    def finish(self) -> None:
        """Start the run, again and again, until it ends."""
        while True:
            self.starts += 1
            check(self.starts < 40, "the run does not come to its end")
            try:
                result = self._start()
            except (PowerCut, CrashError):
                pass
            except QuorumError:
                first = self.server.now.round == 0 or self.plan.limits.below_quorum == "error"
                check(first, "too few nodes ended a run that may go on")
                if not self.plan.resumable or self.starts > 8:
                    return
            else:
                self._compare_result(result)
                return
            check(self.plan.resumable, "a crash that was not scheduled")
            self.world.restart_server()

    def _start(self) -> Result:
        saved = self.server.saved
        self.server.restart()
        strategy = self.plan.strategy(str(self.checkpoint) if self.plan.resumable else "")
        grid = Watched(self.world, self.plan, self.server)
        self._wrap(strategy)
        try:
            return strategy.start(
                grid, initial(), num_rounds=self.plan.rounds, timeout=TIMEOUT, evaluate_fn=self._evaluate
            )
        finally:
            if saved is not None:
                check(strategy.progress.before == saved.round, "the run does not go on from its checkpoint")

    def _evaluate(self, server_round: int, arrays: Any) -> MetricRecord:
        if server_round:
            check(server_round == self.server.now.round, "rounds are numbered wrong")
        return MetricRecord({"round": server_round})

    def _wrap(self, strategy: Any) -> None:
        """Compare what a strategy does in each round with what it must do."""
        configure, aggregate, recall = strategy.configure_train, strategy.aggregate_train, strategy.recall

        def configure_train(server_round: int, arrays: Any, config: Any, grid: Any) -> list[Message]:
            messages = configure(server_round, arrays, config, grid)
            self.server.now.round = server_round = server_round + strategy.progress.before
            expected = 1 + (self.server.saved.round if self.server.saved else self.rounds)
            check(not self.plan.resumable or server_round == expected, f"round {server_round}, not {expected}")
            owing = {way.node_id for way in grid.ways.values()} | {m.metadata.src_node_id for m in grid.late}
            self.server.asks([message.metadata.dst_node_id for message in messages], owing)
            self.clients.sent[server_round] = flatten(to_arrays(arrays))
            return list(messages)

        def aggregate_train(server_round: int, replies: Iterable[Message]) -> Any:
            replies, before = list(replies), _state(strategy)
            server_round += strategy.progress.before
            steps = self.server.round(server_round, replies)
            result = aggregate(server_round - strategy.progress.before, replies)
            self._compare_step(strategy, before, steps, result)
            self._note_arrays(strategy)
            self.rounds += 1
            return result

        def recalled(params: NamedArrays, saved: Any) -> None:
            recall(params, saved)
            strategy._params = params
            self._note_arrays(strategy)
            self.server.compare(strategy)

        strategy.configure_train, strategy.aggregate_train = configure_train, aggregate_train
        strategy.recall = recalled

    def _note_arrays(self, strategy: Any) -> None:
        """Remember the arrays of the newest version."""
        broadcast = strategy.downlink.broadcast
        if broadcast is not None:
            arrays = flatten(broadcast.arrays)
            known = self.clients.arrays.setdefault(broadcast.version, arrays)
            check(np.array_equal(known, arrays), "two arrays have the same version")

    def _compare_step(self, strategy: Any, before: Vector, steps: Any, result: Any) -> None:
        arrays, metrics = result
        check((arrays is None) == (steps is None), "the model stays, or moves, and should not")
        check((metrics is None) == (steps is None), "a round without metrics, or with")
        if steps is not None:
            after = flatten(to_arrays(arrays)).astype(np.float64)
            broadcast = strategy.downlink.broadcast
            if broadcast is not None:
                check(np.array_equal(after, flatten(broadcast.arrays)), "the server goes on with other arrays")
                after = after + flatten(broadcast.residual)
            scale = max(np.abs(before).max(), np.abs(after).max(), 1e-3)
            error = min(np.abs(after - before - step).max() for step in steps)
            check(error <= TOLERANCE * scale, f"the model moved otherwise: by {error / scale:.2g}")
        else:
            check(np.array_equal(_state(strategy), before), "the model moved in a round that does not count")
        self.server.compare(strategy)

    def _compare_result(self, result: Result) -> None:
        every = list(range(self.plan.rounds + 1))
        check(sorted(result.evaluate_metrics_serverapp) == every, "a round is missing in the result")
        for k, metrics in result.evaluate_metrics_serverapp.items():
            check(metrics["round"] == k, "a round's result is another's")
        check(sorted(result.train_metrics_clientapp) == self.server.now.trained, "other rounds have metrics")
        check(len(self.server.now.trained) == len(set(self.server.now.trained)), "a round counts twice")
        check(bool(result.arrays), "no arrays")


def _state(strategy: Any) -> Vector:
    """Return the server's own arrays: those of the newest version, and what coding lost."""
    broadcast = strategy.downlink.broadcast
    arrays = flatten(strategy._params).astype(np.float64)
    return (
        arrays if broadcast is None else flatten(broadcast.arrays).astype(np.float64) + flatten(broadcast.residual)
    )


# ---- the power goes off, at every point where that might matter ------------------------------------


@contextmanager
def hooks(run: Run) -> Iterator[None]:
    """Let clients and the server crash while they write; no write waits for a disk, and nothing is logged."""
    write_archive, append_lines, write_slot = (
        fedkit.checkpoint.write_archive,
        fedkit.ledger.append_lines,
        Memories._write,
    )
    world = run.world

    def server_archive(path: Path, arrays: Mapping[str, Any]) -> None:
        if world.tick():
            path.with_name(f"{path.name}.{os.getpid()}.tmp").write_bytes(b"PK half of it")
            raise PowerCut
        write_archive(path, arrays)
        run.server.checkpoint()
        if world.tick():
            raise PowerCut

    def client_archive(path: Path, arrays: Mapping[str, Any]) -> None:
        world.write_state(lambda: write_archive(path, arrays))

    def lines(path: Path, *args: Any, **options: Any) -> int:
        if world.tick():
            with path.open("a") as file:
                file.write('{"half": "of a li')
            raise PowerCut
        return append_lines(path, *args, **options)

    def slot(self: Memories, client_id: str, number: int, vector: Vector, digest: bytes) -> None:
        if world.tick():
            half = vector.copy()
            half[half.size // 2 :] = 7.0
            checksum = self._checksum(digest, vector)
            with patch.object(Memories, "_checksum", lambda *_: checksum):
                write_slot(self, client_id, number, half, digest)
            raise PowerCut
        write_slot(self, client_id, number, vector, digest)
        if world.tick():
            raise PowerCut

    with ExitStack() as stack:
        stack.enter_context(patch.object(os, "fsync", lambda _: None))
        stack.enter_context(patch("fedkit.booking.object_sizes", lambda _: [1]))
        stack.enter_context(patch.object(ast, "literal_eval", lru_cache(ast.literal_eval)))  # NumPy's headers
        stack.enter_context(patch("fedkit.checkpoint.write_archive", server_archive))
        stack.enter_context(patch("fedkit.state.write_archive", client_archive))
        stack.enter_context(patch("fedkit.ledger.append_lines", lines))
        stack.enter_context(patch.object(Memories, "_write", slot))
        for name in ("flwr", "fedkit"):
            stack.callback(logging.getLogger(name).setLevel, logging.getLogger(name).level)
            logging.getLogger(name).setLevel(logging.CRITICAL + 1)
        yield


def play(seed: int) -> Run:
    """Run the schedule of a seed and return it; raises ScheduleError if an invariant does not hold."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(prefix="schedule-", dir=memory if memory.is_dir() else None))
    try:
        run = Run(draw(seed), folder)
        with hooks(run):
            run.finish()
        return run
    finally:
        shutil.rmtree(folder, ignore_errors=True)
