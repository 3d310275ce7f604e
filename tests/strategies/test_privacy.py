"""Flower's differential privacy with fedkit: what works is private, the rest is refused with the reason."""

import logging
from functools import partial

import numpy as np
import pytest
from flwr.clientapp.mod import LocalDpMod, adaptiveclipping_mod, fixedclipping_mod
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)

from fedkit.arrays import flatten
from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod, TacMod
from fedkit.codec import EntropyConstrained, ZeroMidTread
from fedkit.errors import ConfigError
from fedkit.message import to_arrays
from fedkit.row_masks import RowMask
from fedkit.strategies import Aquila, ErrorFeedback, Plain, Safari, Tac
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import client_app, initial, optimum, targets

ALL = {"fraction_evaluate": 0.0, "min_train_nodes": 4, "min_available_nodes": 4}


def grid(*mods, rate=0.3):
    return InProcessGrid([client_app(list(mods), target, rate=rate) for target in targets(4)])


def local_dp(clip, noise):
    """Flower's mod, with this norm and this standard deviation of the noise."""
    return LocalDpMod(clip, noise, 1.0, 1.25 / np.exp(0.5))


def moved(strategy, mods, rounds=1, rate=0.3):
    result = strategy.start(grid(*mods, rate=rate), initial(), num_rounds=rounds)
    return flatten(to_arrays(result.arrays))


def test_local_dp_inside_the_mod_clips_the_update_before_it_is_coded():
    step = moved(Plain(**ALL, downlink=None), [AquilaMod(), local_dp(1e-3, 0.0)])
    assert 0 < np.linalg.norm(step) <= 1e-3 * (1 + 1e-5)  # a mean of four that are no longer


@pytest.mark.parametrize("quantizer", [None, EntropyConstrained(6.0)])
def test_local_dp_inside_the_mod_adds_its_noise_before_it_is_coded(quantizer):
    step = moved(Plain(quantizer=quantizer, **ALL, downlink=None), [AquilaMod(), local_dp(1e-6, 0.1)])
    assert 0.03 < step.std() < 0.08  # 0.1 / √4, of 88 entries


@pytest.mark.parametrize(
    ("strategy", "mod"),
    [
        (Aquila, AquilaMod),
        (partial(ErrorFeedback, quantizer=ZeroMidTread(8, 8)), ErrorFeedbackMod),
        (partial(Safari, density=0.5), SafariMod),
    ],
    ids=["aquila", "error-feedback", "safari"],
)
def test_every_scheme_learns_from_updates_with_noise(strategy, mod):
    params = moved(strategy(**ALL), [mod(), local_dp(100.0, 1e-3)], rounds=15)
    assert np.linalg.norm(params - optimum(4)) < 0.5 * np.linalg.norm(optimum(4))


def test_clusters_go_with_local_dp_too():
    result = Tac(num_clusters=1, **ALL).start(grid(TacMod(), local_dp(100.0, 1e-3)), initial(), num_rounds=15)
    assert np.linalg.norm(flatten(to_arrays(result.arrays)) - optimum(4)) < 0.1


def test_what_error_feedback_keeps_is_of_updates_with_noise():
    """Two apps of which only the noise differs keep other residuals: nothing bypasses the mod."""
    residuals = []
    for seed in (1, 2):
        np.random.seed(seed)
        each = grid(ErrorFeedbackMod(), local_dp(1e-9, 1.0), rate=0.0)
        ErrorFeedback(**ALL).start(each, initial(), num_rounds=2)
        residuals.append(str(each.contexts[1000].state))
    assert residuals[0] != residuals[1]


def test_local_dp_outside_the_mod_is_an_error_that_says_what_to_do(caplog):
    with caplog.at_level(logging.WARNING):
        moved(Aquila(**ALL), [local_dp(1.0, 0.1), AquilaMod()])
    assert "or has another before it that needs arrays" in caplog.text


def test_rows_that_rest_do_not_go_with_noise(caplog):
    strategy = ErrorFeedback(row_mask=RowMask(active_rank=2), **ALL)
    with caplog.at_level(logging.WARNING):
        assert not moved(strategy, [ErrorFeedbackMod(), local_dp(1.0, 0.1)]).any()
    assert "rest" in caplog.text


@pytest.mark.parametrize("rounds", [30])
def test_noise_of_the_server_works_around_the_plain_mean_of_float32_updates(rounds):
    private = DifferentialPrivacyClientSideFixedClipping(Plain(weighted=False, **ALL), 0.001, 2.0, 4)
    params = moved(private, [AquilaMod(), fixedclipping_mod], rounds=rounds)
    assert np.linalg.norm(params - optimum(4)) < 0.1 * np.linalg.norm(optimum(4))
    clipped = DifferentialPrivacyClientSideFixedClipping(Plain(weighted=False, **ALL), 0.0, 1e-3, 4)
    assert 0 < np.linalg.norm(moved(clipped, [AquilaMod(), fixedclipping_mod])) <= 1e-3 * (1 + 1e-5)


def test_adaptive_clipping_by_clients_moves_its_norm_as_around_fedavg():
    norms = []
    for strategy in (Plain(weighted=False, **ALL), FedAvg(**ALL)):
        private = DifferentialPrivacyClientSideAdaptiveClipping(strategy, 0.1, 4, clipped_count_stddev=0.1)
        moved(private, [AquilaMod(), adaptiveclipping_mod], rounds=4)
        norms.append(private.clipping_norm)
    assert norms[0] == pytest.approx(norms[1], rel=0.1)
    assert abs(np.log(norms[0] / 0.1)) > 0.2  # of 0.1 at first


@pytest.mark.parametrize(
    "strategy",
    [Aquila(**ALL), ErrorFeedback(**ALL), Safari(**ALL), Plain(**ALL), Plain(quantizer=EntropyConstrained(1.0))],
    ids=lambda s: type(s).__name__,
)
def test_noise_of_the_server_is_refused_where_it_would_not_be_enough(strategy):
    private = DifferentialPrivacyClientSideFixedClipping(strategy, 1.0, 1.0, 4)
    with pytest.raises(ConfigError, match="calibrated for float32 uploads"):
        moved(private, [AquilaMod(), fixedclipping_mod])


@pytest.mark.parametrize("make", [Aquila, Plain, ErrorFeedback])
def test_clipping_by_the_server_is_refused_with_the_reason(make):
    for private in (
        DifferentialPrivacyServerSideFixedClipping(make(**ALL), 1.0, 1.0, 4),
        DifferentialPrivacyServerSideAdaptiveClipping(make(**ALL), 0.1, 4),
    ):
        with pytest.raises(ConfigError, match="would be given frames"):
            moved(private, [AquilaMod(), ErrorFeedbackMod()])


def test_secure_aggregation_is_refused_with_the_reason():
    with pytest.raises(ConfigError, match="masks cancel"):
        Plain(**ALL).initialize_parameters(client_manager=None)  # where Flower's SecAggPlusWorkflow begins
