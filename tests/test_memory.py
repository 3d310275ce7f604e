"""The acknowledgement rule: client and server agree on what the server has, whatever was lost."""

import numpy as np
import pytest
from flwr.app import RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.aggregation.lazy import LazyMean
from fedkit.arrays import zeros_like
from fedkit.clients import AquilaMod
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.wire import Codec, decode
from fedkit.faults import Faults
from fedkit.memory import GENESIS, ClientMemory, chain
from fedkit.rounds import RoundGrid
from fedkit.state import ClientState
from fedkit.strategies import Aquila
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, client_app, initial, optimum, targets

UPDATE = {name: np.full(a.shape, 0.5, np.float32) for name, a in LIKE.items()}
FRAME = Codec(ZeroMidTread()).encode(UPDATE)


def memory(state):
    return ClientMemory(state, "aquila", like=LIKE)


def equal(a, b):
    return all(np.array_equal(a[name], b[name]) for name in LIKE)


def test_settle_commits_what_the_server_accepted():
    state = {}
    memory(state).stage(FRAME)
    settled = memory(state).settle(chain(GENESIS, FRAME))
    assert equal(settled, decode(FRAME, like=LIKE))


def test_settle_rolls_back_what_was_lost():
    state = {}
    memory(state).stage(FRAME)
    assert equal(memory(state).settle(GENESIS), zeros_like(LIKE))
    assert memory(state).digest == GENESIS


def test_settle_forgets_when_the_server_knows_another_history():
    state = {}
    memory(state).stage(FRAME)
    memory(state).settle(chain(GENESIS, FRAME))
    assert equal(memory(state).settle(b"x" * 16), zeros_like(LIKE))
    assert memory(state).digest == GENESIS


def test_a_memory_for_other_shapes_is_forgotten():
    state = {}
    memory(state).settle(GENESIS)
    other = ClientMemory(state, "aquila", like={"lora_A": np.zeros((8, 12), np.float32)})
    assert other.digest == GENESIS
    assert not other.arrays["lora_A"].any()


class WatchedGrid(RoundGrid):
    """Loses replies and client states by a given schedule; checks the two sides after every delivery."""

    def __init__(self, inner, strategy, schedule):
        super().__init__(inner)
        self.strategy, self.schedule, self.checks = strategy, list(schedule), 0
        self.forgetful = any("forget" in events for events in schedule)

    def send_and_receive(self, messages, *, timeout=None):
        if not messages:  # no client-side evaluation
            return []
        events = self.schedule.pop(0)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.check_settled()
        for node_id, event in zip(self.inner.apps, events, strict=True):
            if event == "forget":
                self.inner.contexts[node_id].state = RecordDict()
        lost = {n for n, event in zip(self.inner.apps, events, strict=True) if event == "lose"}
        return [r for r in replies if r.metadata.src_node_id not in lost]

    def check_settled(self):
        """A client has just settled: its memory and the server's must be the same, bytes and digest."""
        for node_id, context in self.inner.contexts.items():
            name = str(context.node_config["partition-id"])
            mine = memory(ClientState(context, self.strategy.progress.experiment).load())
            has_forgotten = self.forgetful and mine.digest == GENESIS
            assert has_forgotten or self.strategy.registry.accepted.get(name, GENESIS) == mine.digest
            if mine.digest != GENESIS:
                assert equal(mine.arrays, self.strategy.state.memory[name]), node_id
                self.checks += 1


@settings(max_examples=25, deadline=None)
@given(data=st.data(), rounds=st.integers(1, 12))
def test_both_sides_agree_after_every_acknowledgement(data, rounds):
    events = st.sampled_from(["arrive", "arrive", "lose", "forget"])
    schedule = data.draw(st.lists(st.lists(events, min_size=3, max_size=3), min_size=rounds, max_size=rounds))
    strategy = Aquila(beta=0.2, downlink=None, fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    grid = WatchedGrid(InProcessGrid([client_app([AquilaMod()], t) for t in targets(3)]), strategy, schedule)
    strategy.start(grid, initial(), num_rounds=rounds)
    everything_arrived = all(event == "arrive" for row in schedule for event in row)
    assert not everything_arrived or rounds < 2 or grid.checks >= 3 * (rounds - 1)
    assert all(grid.ledger.round_totals(k)["rejected"] == 0 for k in range(1, rounds + 1))


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_training_reaches_the_same_optimum_with_and_without_loss(drop, beta):
    strategy = Aquila(beta=beta, downlink=None, fraction_evaluate=0.0, min_train_nodes=5)
    grid = InProcessGrid([client_app([AquilaMod()], t) for t in targets(5)])
    result = strategy.start(RoundGrid(grid, faults=Faults(drop=drop)), initial(), num_rounds=60)
    params = np.concatenate([a.numpy().ravel() for a in result.arrays.values()])
    assert np.linalg.norm(params - optimum(5)) < 1e-3 * np.linalg.norm(optimum(5))


def test_without_the_acknowledgement_the_same_run_goes_wrong(monkeypatch):
    """The rule is not decoration: a client that trusts its memory at once ends elsewhere."""

    def trust_at_once(self, accepted):
        if self._staged is not None:
            self.arrays = {n: a + decode(self._staged, like=LIKE)[n] for n, a in self.arrays.items()}
            self._staged = None
        self.digest = accepted
        self._save()
        return self.arrays

    monkeypatch.setattr(ClientMemory, "settle", trust_at_once)
    strategy = Aquila(beta=0.0, downlink=None, fraction_evaluate=0.0, min_train_nodes=5)
    grid = InProcessGrid([client_app([AquilaMod()], t) for t in targets(5)])
    result = strategy.start(RoundGrid(grid, faults=Faults(drop=0.3)), initial(), num_rounds=60)
    params = np.concatenate([a.numpy().ravel() for a in result.arrays.values()])
    assert np.linalg.norm(params - optimum(5)) > 0.05 * np.linalg.norm(optimum(5))


def test_lazy_mean_counts_silent_clients_with_what_they_sent_before():
    from fedkit.aggregation.protocol import Cohort, Upload

    aggregator, params = LazyMean(), zeros_like(LIKE)

    def upload(name, arrays, fresh=True):
        return Upload(1, name, 10.0, arrays, None, fresh, {}, 0, GENESIS)

    cohort = Cohort(1, {})
    first = aggregator(
        params, cohort, [upload("a", UPDATE), upload("b", zeros_like(LIKE))], aggregator.init(params)
    )
    second = aggregator(first.params, cohort, [upload("b", None)], first.state)
    assert np.allclose(first.params["lora_A"], 0.25)
    assert np.allclose(second.params["lora_A"], 0.5)
    third = aggregator(second.params, cohort, [upload("a", zeros_like(LIKE))], second.state)
    assert np.allclose(third.params["lora_A"], 0.5), "a fresh upload replaces, it does not add"
