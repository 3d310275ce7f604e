"""Naive averaging is what it says, and the table shows each arm at its best learning rate."""

import numpy as np
import pytest

from benchmarks.mixed_ranks import ARMS, ZeroPadded, compare
from fedkit.aggregation.lora import LORA_GAP
from fedkit.aggregation.protocol import Cohort, Upload
from fedkit.arrays import zeros_like
from fedkit.submodels import embed, lora_rank, take

A, B = "lora_A", "lora_B"


def random_arrays(seed):
    rng = np.random.default_rng(seed)
    return {A: rng.normal(size=(4, 6)).astype(np.float32), B: rng.normal(size=(5, 4)).astype(np.float32)}


def test_what_a_client_does_not_hold_counts_as_zero():
    params = random_arrays(0)
    held = [
        embed(take(random_arrays(i), lora_rank(r)(params)), lora_rank(r)(params), like=params)
        for i, r in ((1, 2), (2, 4))
    ]
    cohort = Cohort(1, dict(enumerate(held)))
    uploads = [Upload(i, str(i), 1.0 + i, zeros_like(params), None, True, {}, 0, bytes(16)) for i in range(2)]
    new, _, metrics, _ = ZeroPadded()(params, cohort, uploads, None)
    for name in params:
        np.testing.assert_allclose(new[name], (held[0][name] + 2 * held[1][name]) / 3, rtol=1e-6)
    assert metrics[LORA_GAP] > 0


def test_an_arm_is_shown_at_its_best_rate():
    rows = [
        {"rate": rate, "accuracy": [0.1, final, final, final], "gap": [0.5]}
        for rate, final in ((0.1, 0.6), (0.1, 0.8), (0.2, 0.75), (0.2, 0.75))
    ]
    line = compare("arm", rows)
    assert (line["rate"], line["final"]) == (0.2, pytest.approx(0.75))
    assert set(ARMS) >= {"factors", "product"}
