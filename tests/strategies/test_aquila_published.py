"""AQUILA as published, against the paper's equations written down in float64, without Flower or frames."""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest

from fedkit.arrays import flatten
from fedkit.faults import Faults
from fedkit.message import from_arrays, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Aquila
from tests.helpers.gradient import SIZE, Quadratic, app_of, optimum
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE

ROUNDS, NUM = 50, 4
PROBLEMS = [Quadratic.draw(seed, 0.7) for seed in range(NUM)]


@dataclass
class Trace:
    """What the paper's loop does: by client, then by round."""

    theta: np.ndarray
    bits: list = field(default_factory=lambda: [[] for _ in range(NUM)])
    levels: list = field(default_factory=lambda: [[] for _ in range(NUM)])


def paper(alpha, beta, rounds=ROUNDS):
    """The algorithm of the paper, equation by equation; `alpha` by round, from 1 on."""
    theta, previous = np.zeros(SIZE), None
    q, trace = [np.zeros(SIZE) for _ in range(NUM)], Trace(theta)
    for k in range(1, rounds + 1):
        for m, problem in enumerate(PROBLEMS):
            v = problem.gradient(theta) - q[m]
            big_r = np.abs(v).max()
            b = math.floor(math.log2(big_r * math.sqrt(SIZE) / np.linalg.norm(v) + 1))
            tau = 1 / (2**b - 1)
            psi = np.floor((v + big_r) / (2 * tau * big_r) + 1 / 2)
            dq = 2 * tau * big_r * psi - big_r
            eps = v - dq
            size = np.sum(dq**2) + np.sum(eps**2)
            if k > 1 and size <= beta / alpha(k - 1) ** 2 * np.sum((theta - previous) ** 2):
                b, psi = 0, np.zeros(0)
            else:
                q[m] = q[m] + dq
            trace.bits[m].append(b)
            trace.levels[m].append(psi)
        previous, theta = theta, theta - alpha(k) * sum(q) / NUM
    trace.theta = theta
    return trace


def falling(k):
    return 0.8 / math.sqrt(k)


@pytest.mark.parametrize(("alpha", "beta"), [(lambda k: 0.5, 0.0), (lambda k: 0.5, 4.0), (falling, 4.0)])
def test_levels_bits_and_skips_are_the_papers(alpha, beta):
    seen = [[] for _ in range(NUM)]
    grid = RoundGrid(InProcessGrid([app_of(p, None, seen=s) for p, s in zip(PROBLEMS, seen, strict=True)]))
    strategy = Aquila.published(beta=beta, step_size=alpha, fraction_evaluate=0.0, min_train_nodes=NUM)
    result = strategy.start(grid, from_arrays(LIKE), num_rounds=ROUNDS)
    expected = paper(alpha, beta)
    for m in range(NUM):
        assert [sent.bits for sent in seen[m]] == expected.bits[m]
        for sent, levels in zip(seen[m], expected.levels[m], strict=True):
            # an update is minus the gradient: level ψ of one is 2^b − 1 − ψ of the other
            mirrored = 2.0**sent.bits - 1 - levels if sent.bits else levels
            np.testing.assert_array_equal(sent.levels, mirrored)
    theta = flatten(to_arrays(result.arrays)).astype(np.float64)
    assert np.linalg.norm(theta - expected.theta) <= 1e-6 * np.linalg.norm(expected.theta)
    widths = {b for bits in expected.bits for b in bits}
    assert len(widths - {0}) > 1, "more than one level was chosen"
    assert (0 in widths) == (beta > 0), "somebody skipped, if that is allowed"


def test_without_a_step_size_a_constant_one_is_absorbed():
    """``Δq``, ``ε`` and ``θ^k − θ^{k−1}`` all shrink by α together."""
    rate = 0.3

    def run(**options):
        seen = [[] for _ in range(NUM)]
        apps = [app_of(p, rate, seen=s) for p, s in zip(PROBLEMS, seen, strict=True)]
        strategy = Aquila.published(beta=0.5, fraction_evaluate=0.0, min_train_nodes=NUM, **options)
        result = strategy.start(RoundGrid(InProcessGrid(apps)), from_arrays(LIKE), num_rounds=20)
        return flatten(to_arrays(result.arrays)), [[sent.bits for sent in s] for s in seen]

    (one, bits), (other, same) = run(), run(step_size=rate)
    assert bits == same
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_the_fixed_point_is_the_optimum_whatever_is_lost():
    """On a strongly convex quadratic; with the grid that has a zero, for the published one does not settle."""
    found = []
    for faults in (None, Faults(seed=1, drop=0.4)):
        grid = RoundGrid(InProcessGrid([app_of(p, 0.5) for p in PROBLEMS]), faults=faults)
        strategy = Aquila(downlink=None, weighted=False, fraction_evaluate=0.0, min_train_nodes=NUM)
        result = strategy.start(grid, from_arrays(LIKE), num_rounds=60)
        found.append(flatten(to_arrays(result.arrays)).astype(np.float64))
    best = optimum(PROBLEMS)
    for theta in found:
        assert np.linalg.norm(theta - best) <= 1e-2 * np.linalg.norm(best)
