"""What AQUILA's server remembers: whoever it can no longer trust starts anew, and the run goes on."""

import logging

import numpy as np
import pytest

from fedkit.aggregation.lazy import LazyState
from fedkit.clients import AquilaMod
from fedkit.errors import ConfigError
from fedkit.rounds import RoundGrid
from fedkit.strategies import Aquila
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, client_app, initial, optimum, targets

NUM = 5
OPTIONS = {"beta": 0.2, "downlink": None, "fraction_evaluate": 0.0, "min_train_nodes": NUM}


class Watched(Aquila):
    """Does something after a round; notes how many histories there are after each."""

    def __init__(self, after, **options):
        super().__init__(**OPTIONS, **options)
        self.after, self.known = after, []

    def aggregate_train(self, server_round, replies):
        result = super().aggregate_train(server_round, replies)
        assert self.registry.accepted == self.state.digests
        self.known.append(len(self.registry.accepted))
        if server_round in self.after:
            self.after[server_round](self)
        return result


def run(strategy, rounds):
    grid = RoundGrid(InProcessGrid([client_app([AquilaMod()], t) for t in targets(NUM)]))
    result = strategy.start(grid, initial(), num_rounds=rounds)
    assert all(grid.ledger.round_totals(k)["rejected"] == 0 for k in range(1, rounds + 1))
    return np.concatenate([a.numpy().ravel() for a in result.arrays.values()])


def distance(params):
    return np.linalg.norm(params - optimum(NUM)) / np.linalg.norm(optimum(NUM))


def confuse(strategy):
    """Make the server tell client 2 a history that it does not have, as if the client had lost its memory."""
    strategy.registry.accepted["2"] = b"another history!"


def test_the_sum_trains_as_each_does():
    each, total = run(Aquila(**OPTIONS), 20), run(Aquila(memory="sum", **OPTIONS), 20)
    np.testing.assert_allclose(total, each, rtol=1e-3, atol=1e-4)


def test_with_each_one_client_starts_anew():
    strategy = Watched({10: confuse})
    assert distance(run(strategy, 60)) < 1e-3
    assert strategy.known == [NUM] * 60


def test_with_the_sum_all_start_anew(caplog):
    strategy = Watched({10: confuse}, memory="sum")
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        assert distance(run(strategy, 60)) < 1e-3
    assert strategy.known == [NUM] * 10 + [0] + [NUM] * 49
    assert f"all {NUM} start anew" in caplog.text


def test_a_file_lost_during_the_run_costs_one_client(tmp_path):
    def on_disk(strategy):
        strategy.state = LazyState.open(LIKE, tmp_path)
        strategy.registry.accepted = {}

    def lose(strategy):
        sorted(tmp_path.iterdir())[0].unlink()

    strategy = Watched({1: on_disk, 10: lose})
    assert distance(run(strategy, 60)) < 1e-3
    assert strategy.known == [NUM] * 10 + [NUM - 1] + [NUM] * 49
    assert len(list(tmp_path.iterdir())) == NUM


def test_an_unknown_memory_is_refused():
    with pytest.raises(ConfigError, match="'each' or 'sum'"):
        Aquila(memory="none")
