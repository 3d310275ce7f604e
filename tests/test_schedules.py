"""Random schedules: whatever goes wrong, clients, server and their slow twins agree after every round."""

import pytest

from benchmarks.schedules import main, play_all
from fedkit.clients import AquilaMod, ErrorFeedbackMod
from fedkit.codec.wire import decode
from fedkit.faults import Event, Faults
from fedkit.limits import Limits
from fedkit.memory import ClientMemory, chain
from fedkit.rounds import RoundGrid
from fedkit.strategies import Aquila, ErrorFeedback, Plain
from tests.helpers.grid import InProcessGrid, VirtualTime
from tests.helpers.quadratic import client_app, initial, targets
from tests.helpers.schedules.plan import draw


def test_random_schedules_keep_all_invariants():
    tally = play_all(range(10_000, 10_060), seconds=8)
    assert not tally.failures
    assert tally.schedules >= 5
    assert tally.starts > tally.schedules, "some servers restart"


def test_a_schedule_is_drawn_from_its_seed_alone():
    assert draw(7) == draw(7) != draw(8)


def test_a_memory_that_is_trusted_at_once_is_found(monkeypatch):
    """The twins are not decoration: they find the error that the acknowledgement is there for."""

    def trust_at_once(self, accepted):
        if self._staged is not None:
            self.arrays = self._committed(decode(self._staged, like=self._like))
            self.digest, self._staged = chain(self.digest, self._staged), None
        self.digest = accepted
        self._save()
        return self.arrays

    monkeypatch.setattr(ClientMemory, "settle", trust_at_once)
    assert play_all(range(8)).failures


def test_an_evaluation_with_too_few_nodes_does_not_end_the_run_in_the_first_round():
    class Shrinking(InProcessGrid):
        """Two of three nodes leave once they have trained."""

        def get_node_ids(self):
            return list(self.apps)[: 1 if next(self.numbers) > 3 else 3]

    grid = Shrinking([client_app([AquilaMod()], target) for target in targets(3)])
    strategy = Aquila(
        min_train_nodes=1, min_available_nodes=2, fraction_evaluate=1.0, min_evaluate_nodes=1, node_timeout=5.0
    )
    wrapped = RoundGrid(grid, limits=Limits(below_quorum="keep"), clock=VirtualTime())
    result = strategy.start(wrapped, initial(), num_rounds=2)
    assert list(result.train_metrics_clientapp) == [1]


def test_what_error_feedback_sent_again_does_not_count_twice(tmp_path):
    """A client is late, restarts as another node, and sends again what it cannot know to be on its way."""
    grid = InProcessGrid([client_app([ErrorFeedbackMod()], target) for target in targets(2)])
    grid.contexts[1000].node_config["state-dir"] = str(tmp_path)

    def restart(server_round, _):
        if server_round == 1:
            grid.apps[2000], grid.contexts[2000] = grid.apps.pop(1000), grid.contexts.pop(1000)

    delays = [Event(1, "0", delay=10), Event(2, "0", delay=20), Event(2, "1", delay=12), Event(3, "1", delay=15)]
    limits = Limits(quorum=0.5, grace=0.0, deadline=60.0)
    wrapped = RoundGrid(grid, limits=limits, faults=Faults(events=tuple(delays)), clock=VirtualTime())
    strategy = ErrorFeedback(fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1)
    strategy.start(wrapped, initial(), num_rounds=3, evaluate_fn=restart)
    totals = [wrapped.ledger.round_totals(k) for k in (1, 2, 3)]
    assert [t["late"] for t in totals] == [0, 1, 1]
    assert [t["rejected"] for t in totals] == [0, 0, 1]


def test_a_node_whose_late_answer_waits_for_a_round_is_not_asked_before():
    """It comes while the model is evaluated, and counts in the next round, once."""

    class Slow(InProcessGrid):
        held = ()

        def pull_messages(self, message_ids):
            replies = super().pull_messages(message_ids)
            slow = [r for r in replies if r.metadata.src_node_id == 1000 and r.metadata.message_type == "train"]
            testing = any(r.metadata.message_type == "evaluate" for r in replies)
            released, self.held = (self.held, ()) if testing else ((), (*self.held, *slow))
            return [r for r in replies if r not in slow] + list(released)

        def get_node_ids(self):
            return list(self.apps)[left:]

    left = 0

    def leave(server_round, _):
        nonlocal left
        left = int(server_round == 2)

    grid = Slow([client_app([AquilaMod()], target) for target in targets(2)])
    wrapped = RoundGrid(grid, limits=Limits(quorum=0.5, grace=0.0), clock=VirtualTime())
    strategy = Plain(min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1)
    strategy.start(wrapped, initial(), num_rounds=3, evaluate_fn=leave)
    totals = [wrapped.ledger.round_totals(k) for k in (1, 2, 3)]
    assert [(t["asked"], t["late"], t["rejected"]) for t in totals] == [(2, 1, 0), (1, 0, 0), (1, 0, 0)]


def test_a_schedule_that_failed_once_does_not_fail_again():
    assert not play_all([34395]).failures


@pytest.mark.slow
def test_a_minute_of_schedules(capsys):
    assert main(["--seconds", "60"]) == 0, capsys.readouterr()


@pytest.mark.slow
@pytest.mark.full
def test_a_hundred_thousand_schedules(tmp_path, capsys):
    assert main(["--full", "--out", str(tmp_path)]) == 0, capsys.readouterr()
