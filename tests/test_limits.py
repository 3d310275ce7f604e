"""The bounds of a round: quorum, grace, deadline; who is late, hangs, fails or answers twice."""

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedkit.clients import ErrorFeedbackMod
from fedkit.codec import EntropyConstrained
from fedkit.errors import ConfigError, QuorumError
from fedkit.faults import Event, Faults
from fedkit.limits import MAX_PAUSE, Limits, Pauses
from fedkit.message import SERVER_ROUND, from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import ErrorFeedback
from tests.helpers.grid import InProcessGrid, VirtualTime
from tests.helpers.quadratic import client_app, initial, targets

NUM = 5
EVERYBODY = {"fraction_evaluate": 0.0, "min_train_nodes": NUM, "min_available_nodes": NUM}
NODES = [1000 + i for i in range(NUM)]


class Watched(InProcessGrid):
    """Never answers for the nodes that hang; keeps who was asked, and checks that nobody is asked twice at once.

    To ask takes `seconds`.
    """

    def __init__(self, apps, hanging=(), clock=None, seconds=0.0):
        super().__init__(apps)
        self.hanging, self.clock, self.seconds = set(hanging), clock, seconds
        self.asked, self.open = [], {}

    def push_messages(self, messages):
        messages = list(messages)
        if self.clock:
            self.clock.sleep(self.seconds)
        for message in messages:
            assert message.metadata.dst_node_id not in self.open.values(), "a busy node was asked"
        self.asked.append(sorted(message.metadata.dst_node_id for message in messages))
        ids = super().push_messages(messages)
        self.open |= {message_id: m.metadata.dst_node_id for message_id, m in zip(ids, messages, strict=True)}
        return ids

    def pull_messages(self, message_ids):
        known = set(message_ids)
        for message_id in set(self.open) - known:  # the grid has given up on it
            del self.open[message_id]
        free = [m for m in message_ids if self.open.get(m) not in self.hanging]
        for message_id in free:
            self.open.pop(message_id, None)
        return super().pull_messages(free)


def grid(apps=None, hanging=(), seconds=0.0, **options):
    apps, clock = apps or [client_app([ErrorFeedbackMod()], target) for target in targets(NUM)], VirtualTime()
    return RoundGrid(Watched(apps, hanging, clock, seconds), clock=clock, **options)


def run(wrapped, rounds, *, make=ErrorFeedback, **options):
    strategy = make(**EVERYBODY, **options)
    return strategy, strategy.start(wrapped, initial(), num_rounds=rounds)


def replies(wrapped, server_round):
    return wrapped.ledger.round_totals(server_round)["replies"]


@pytest.mark.parametrize("make", [ErrorFeedback, FedAvg])
def test_a_hanging_node_costs_a_deadline_and_the_others_count(make):
    wrapped = grid(hanging=[1002], limits=Limits(deadline=30.0))
    _, result = run(wrapped, 1, make=make)
    assert 30 <= wrapped.clock.now < 32
    assert replies(wrapped, 1) == NUM - 1
    assert wrapped.ledger.round_totals(1)["missing"] == 1
    assert result.arrays


def test_after_the_quorum_the_others_have_their_grace_and_no_more():
    wrapped = grid(hanging=[1002, 1003], limits=Limits(quorum=0.6, grace=5.0, deadline=600.0))
    run(wrapped, 3)
    assert 5 <= wrapped.clock.now < 7  # once: later rounds do not wait for who is busy
    assert wrapped.inner.asked == [NODES, [1000, 1001, 1004], [1000, 1001, 1004]]  # the two are busy


def test_flowers_timeout_is_the_deadline_unless_one_is_set():
    wrapped = grid(hanging=[1002])
    ErrorFeedback(**EVERYBODY).start(wrapped, initial(), num_rounds=1, timeout=7.0)
    assert 7 <= wrapped.clock.now < 9


def test_a_messages_ttl_is_the_deadline():
    strategy = ErrorFeedback(**EVERYBODY, limits=Limits(deadline=12.5))
    (message, *_) = strategy.configure_train(1, initial(), ConfigRecord(), grid())
    assert message.metadata.ttl == 12.5


@pytest.mark.parametrize("make", [ErrorFeedback, FedAvg])
def test_below_the_quorum_the_model_stays_and_the_log_says_so(make, caplog):
    limits = Limits(quorum=0.5, deadline=10.0)
    wrapped = grid(hanging=NODES[:4], limits=limits)
    _, result = run(wrapped, 1, make=make)
    assert not result.arrays or not any(array.any() for array in to_arrays(result.arrays).values())
    assert "1 of 5 nodes answered, 3 needed. The model stays as it is." in caplog.text


def test_or_the_run_ends_with_an_error_within_the_deadline():
    wrapped = grid(hanging=NODES[:4])
    with pytest.raises(QuorumError, match="1 of 5 nodes answered, 3 needed"):
        run(wrapped, 1, limits=Limits(quorum=0.5, deadline=10.0, below_quorum="error"))
    assert wrapped.clock.now < 12


def test_nodes_that_are_gone_are_named_and_the_wait_is_bounded():
    wrapped = grid()
    limits = Limits(quorum=1.0, below_quorum="error")
    strategy = ErrorFeedback(**EVERYBODY, limits=limits, node_timeout=20.0)
    strategy.start(wrapped, initial(), num_rounds=1)
    for node_id in (1001, 1003):
        del wrapped.inner.apps[node_id]
    before = wrapped.clock.now
    with pytest.raises(QuorumError, match=r"expected 5 nodes within 20 s, got 3, .*Missing: 1, 3\."):
        strategy.configure_train(2, initial(), ConfigRecord(), wrapped)
    assert 20 <= wrapped.clock.now - before < 22


def test_without_them_a_quorum_goes_on_at_once():
    wrapped = grid(limits=Limits(quorum=0.6))
    strategy = ErrorFeedback(**EVERYBODY)
    strategy.start(wrapped, initial(), num_rounds=1)
    del wrapped.inner.apps[1001]
    before = wrapped.clock.now
    messages = strategy.configure_train(2, initial(), ConfigRecord(), wrapped)
    assert [m.metadata.dst_node_id for m in messages] == [1000, 1002, 1003, 1004]
    assert wrapped.clock.now == before


@pytest.mark.parametrize("late", ["use", "discard"])
def test_a_late_reply_counts_when_it_comes_or_not_at_all(late):
    faults = Faults(events=(Event(1, "4", delay=8.0),))
    limits = Limits(quorum=0.8, grace=5.0, deadline=60.0, late=late)
    wrapped = grid(seconds=4.0, faults=faults, limits=limits)
    strategy, _ = run(wrapped, 2)
    assert [replies(wrapped, k) for k in (1, 2)] == [4, 4]
    assert [wrapped.ledger.round_totals(k)["late"] for k in (1, 2)] == [0, 1]
    assert not any(wrapped.ledger.round_totals(k)["rejected"] for k in (1, 2))
    assert ("4" in strategy.registry.accepted) == (late == "use")


def test_what_a_late_reply_changes_is_what_it_would_have_changed_in_time():
    one = [client_app([ErrorFeedbackMod()], t, rate=0.0 if i < 4 else 0.3) for i, t in enumerate(targets(NUM))]
    found = {}
    for delay in (0.0, 8.0):
        faults = Faults(events=(Event(1, "4", delay=delay),)) if delay else None
        wrapped = grid(one, seconds=4.0, faults=faults, limits=Limits(quorum=0.8, grace=5.0, deadline=60.0))
        _, result = run(wrapped, 2 if delay else 1, downlink=None, quantizer=EntropyConstrained(8.0))
        found[delay] = to_arrays(result.arrays)
    moved = found[8.0]["lora_A"]
    assert moved.any()
    np.testing.assert_allclose(moved, found[0.0]["lora_A"], rtol=1e-5)


def test_a_reply_that_comes_twice_counts_once():
    plain, doubled = grid(), grid(faults=Faults(duplicate=1.0))
    found = [to_arrays(run(wrapped, 4)[1].arrays) for wrapped in (plain, doubled)]
    for name in found[0]:
        np.testing.assert_array_equal(found[0][name], found[1][name])
    assert [replies(doubled, k) for k in range(1, 5)] == [NUM] * 4


def failing(until):
    app = ClientApp(mods=[ErrorFeedbackMod()])

    @app.train()
    def train(message, context):
        if message.content.config_records["config"][SERVER_ROUND] < until:
            raise RuntimeError("out of battery")
        (record,) = message.content.array_records.values()
        metrics = MetricRecord({"num-examples": 10})
        return Message(
            RecordDict({"arrays": from_arrays(to_arrays(record)), "metrics": metrics}), reply_to=message
        )

    return app


def test_a_failing_node_is_left_alone_ever_longer_and_reinstated_by_an_answer():
    apps = [client_app([ErrorFeedbackMod()], target) for target in targets(NUM - 1)] + [failing(until=8)]
    wrapped = grid(apps)
    run(wrapped, 14)
    asked = [server_round for server_round, nodes in enumerate(wrapped.inner.asked, 1) if 1004 in nodes]
    assert asked == [1, 2, 4, 7, 12, 13, 14]


def test_nodes_that_answer_while_a_round_waits_for_nodes_are_ready():
    """Half answer at once, the others long after: the next rounds wait for those, not for their deadlines."""
    slow = [Event(1, "3", delay=30.0), Event(1, "4", delay=30.0), Event(2, "2", delay=60.0)]
    wrapped = grid(faults=Faults(events=tuple(slow)), limits=Limits(quorum=0.5, grace=1.0))
    run(wrapped, 4)
    assert wrapped.clock.now < 60
    assert [len(nodes) for nodes in wrapped.inner.inner.asked] == [5, 3, 2, 4]
    assert sum(wrapped.ledger.round_totals(k)["late"] for k in range(1, 5)) == 2


def test_whose_answer_came_late_is_not_asked_while_there_are_others():
    pauses = Pauses()
    assert pauses.choose([1, 2, 3], {3}, 5, 3) == [1, 2]
    for _ in range(2):
        pauses.fail(2, 4)
    assert pauses.choose([1, 2, 3], {3}, 5, 2) == [1]
    assert pauses.choose([1, 2, 3], {3}, 5, 3) == [1, 2]
    assert pauses.choose([2, 3], {3}, 5, 1) == [2]
    assert pauses.choose([3], {3}, 5, 1) == [3]


def test_pauses_double_up_to_a_limit():
    pauses = Pauses()
    gaps = []
    server_round = 1
    for _ in range(8):
        pauses.fail(7, server_round)
        following = next(k for k in range(server_round + 1, 99) if pauses.over(7, k))
        gaps.append(following - server_round - 1)
        server_round = following
    assert gaps == [0, 1, 2, 4, 8, MAX_PAUSE, MAX_PAUSE, MAX_PAUSE]
    pauses.clear(7)
    assert pauses.over(7, server_round)


def test_if_all_nodes_fail_they_are_asked_all_the_same():
    wrapped = grid([failing(until=99)] * NUM)
    run(wrapped, 4)
    assert wrapped.inner.asked == [NODES] * 4


def test_a_message_that_flower_refuses_is_missing():
    class Refusing(Watched):
        def push_messages(self, messages):
            return [
                None if m.metadata.dst_node_id == 1000 else super(Refusing, self).push_messages([m])[0]
                for m in messages
            ]

    apps = [client_app([ErrorFeedbackMod()], target) for target in targets(NUM)]
    wrapped = RoundGrid(Refusing(apps), clock=VirtualTime(), limits=Limits(deadline=5.0))
    run(wrapped, 1)
    assert replies(wrapped, 1) == NUM - 1
    assert wrapped.clock.now < 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"quorum": 1.5},
        {"quorum": -0.1},
        {"grace": -1.0},
        {"deadline": 0.0},
        {"late": "maybe"},
        {"below_quorum": "x"},
    ],
)
def test_limits_that_cannot_work_are_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Limits(**wrong)
