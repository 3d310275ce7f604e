"""The size law of `EntropyConstrained`, for whole frames, and how near they come to the entropy."""

from itertools import pairwise

import numpy as np
import pytest

from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.sections import write_mask
from fedkit.codec.sparsify import TopK
from fedkit.codec.wire import Codec, decode, open_frame

RNG = np.random.default_rng(3)
SHAPES = {"a": (64, 200), "b": (200, 64), "c": (25_000,), "bias": (7,), "none": (0, 4), "scalar": ()}
DATA = {
    "gaussian": {name: RNG.normal(size=shape) for name, shape in SHAPES.items()},
    "laplace": {name: RNG.laplace(size=shape) for name, shape in SHAPES.items()},
    "near-equal sizes": {n: RNG.choice([-1, 1], s) * RNG.uniform(0.9, 1.1, s) for n, s in SHAPES.items()},
    "scaled by array": {n: RNG.normal(size=s) * 3.0**i for i, (n, s) in enumerate(SHAPES.items())},
    "heavy tails": {name: RNG.standard_t(3, size=shape) for name, shape in SHAPES.items()},
}
UPDATES = {name: {n: np.float32(a) for n, a in update.items()} for name, update in DATA.items()}
NUM_VALUES = sum(a.size for a in UPDATES["gaussian"].values())

every_update = pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.25, 0.5, 1, 1.05, 1.5, 3, 5, 8])
@every_update
def test_frames_have_the_size_asked_for_and_come_near_the_entropy(rate, update):
    frame = Codec(EntropyConstrained(rate)).encode(update)
    target = rate * NUM_VALUES / 8
    assert abs(len(frame) - target) <= max(0.05 * target, 128 if rate < 0.5 else 0)
    if rate >= 0.5:
        assert 8 * len(frame) <= 1.1 * open_frame(frame, like=update).ideal_bits()


@pytest.mark.parametrize("density", [0.01, 0.3])
@pytest.mark.parametrize("rate", [0.1, 1])
@every_update
def test_a_mask_counts_and_makes_room_for_the_rest(rate, density, update):
    frame = Codec(EntropyConstrained(rate), TopK(density)).encode(update)
    opened = open_frame(frame, like=update)
    assert all(not array[~opened.mask[name]].any() for name, array in opened.arrays().items())
    target, (_, section) = rate * NUM_VALUES / 8, write_mask(opened.mask, None)
    assert len(frame) <= max(1.05 * target, target + 128, 1.05 * (len(section) + target / 2) + 128)


@every_update
def test_more_bytes_never_err_more(update):
    rates = (0.05, 0.2, 0.6, 0.9, 1.2, 3, 8)
    frames = [Codec(EntropyConstrained(rate)).encode(update) for rate in rates]
    decoded = [decode(frame, like=update) for frame in frames]
    errors = [sum(np.square(update[n] - d[n], dtype=np.float64).sum() for n in update) for d in decoded]
    assert all(after <= before * 1.001 for before, after in pairwise(errors))


@pytest.mark.parametrize("count", [1, 2, 10, 100])
@pytest.mark.parametrize("rate", [0.05, 1, 8])
def test_few_values_cost_no_more_than_the_law_allows(rate, count):
    update = {"w": np.random.default_rng(0).normal(size=count).astype(np.float32)}
    frame = Codec(EntropyConstrained(rate)).encode(update)
    assert len(frame) <= rate * count / 8 + 128


def test_the_same_update_makes_the_same_frame():
    update = UPDATES["laplace"]
    assert len({Codec(EntropyConstrained(0.7)).encode(update) for _ in range(3)}) == 1


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9, 1, 1.05, 1.5, 3])
@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (1e-42, 1e-42)])
def test_what_did_not_change_stays_as_it_is(rate, sizes):
    """A frozen array beside values of almost equal size, also where there is room for signs of all of them."""
    rng = np.random.default_rng(0)
    moved = rng.choice([-1, 1], (768, 8)) * rng.choice(sizes, (768, 8))
    update = {"frozen": np.zeros((8, 1024), np.float32), "moved": moved.astype(np.float32)}
    values = decode(Codec(EntropyConstrained(rate)).encode(update), like=update)
    assert not values["frozen"].any()
    lost = values["moved"].astype(np.float64) - update["moved"]
    assert np.linalg.norm(lost) <= np.linalg.norm(update["moved"].astype(np.float64))
