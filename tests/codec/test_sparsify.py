import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkit.arrays import flatten, flatten_mask
from fedkit.codec.frame import HEADER_SIZE, seal
from fedkit.codec.sections import MASK_CODED, MASK_DELTA, MASK_DRAWN, MASKED, Reader, read_mask, write_mask
from fedkit.codec.snapshot import decode_snapshot
from fedkit.codec.sparsify import (
    DrawnMask,
    Magnitude,
    Nonzero,
    Structured,
    TopK,
    density,
    gather,
    prune_and_regrow,
    random_mask,
    scatter,
)
from fedkit.codec.wire import Codec, decode, open_frame
from fedkit.errors import ConfigError, SchemaMismatchError, WireFormatError

LIKE = {"w": np.zeros((8, 10), np.float32), "bias": np.zeros(10, np.float32)}


def some(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=a.shape).astype(np.float32) for name, a in LIKE.items()}


@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_scatter_undoes_gather_on_kept_entries(share, seed):
    arrays, mask = some(seed), random_mask(LIKE, share, np.random.default_rng(seed))
    back = scatter(gather(arrays, mask), mask, like=LIKE)
    assert all(np.array_equal(back[n], arrays[n] * mask[n]) for n in LIKE)


@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_of_equal_values_the_first_are_kept(share, seed):
    values = np.random.default_rng(seed).integers(-4, 4, 60).astype(np.float32)
    kept = TopK(share).mask({"w": values})["w"]
    first = np.argsort(-np.abs(values), kind="stable")[: max(1, round(share * 60))]
    assert set(np.flatnonzero(kept)) == set(first)


@given(share=st.floats(0.0001, 1.0))
def test_random_masks_have_the_density_and_keep_vectors_whole(share):
    mask = random_mask(LIKE, share, np.random.default_rng(0))
    assert mask["w"].sum() == max(1, round(share * 80))
    assert mask["bias"].all()


@given(share=st.floats(0.01, 1.0), rate=st.floats(0, 1), seed=st.integers(0, 99))
def test_prune_and_regrow_keeps_the_density_and_moves_the_share(share, rate, seed):
    mask = random_mask(LIKE, share, np.random.default_rng(seed))
    moved = prune_and_regrow(mask, some(seed), some(seed + 1), rate)
    assert density(moved) == density(mask)
    kept = int(mask["w"].sum())
    assert (mask["w"] & ~moved["w"]).sum() == min(int(rate * kept), 80 - kept)
    assert moved["bias"].all()


def test_the_least_go_and_the_largest_come():
    mask = {"w": np.array([[True, True, False, False]])}
    size = {"w": np.array([[1.0, 5.0, 0.0, 0.0]], np.float32)}
    growth = {"w": np.array([[9.0, 9.0, 2.0, -3.0]], np.float32)}
    assert prune_and_regrow(mask, size, growth, 0.5)["w"].tolist() == [[False, True, False, True]]


def test_a_mask_of_other_shapes_is_refused():
    with pytest.raises(SchemaMismatchError):
        gather(LIKE, {"w": np.ones((8, 10), np.bool_)})


@given(share=st.floats(0.001, 1.0), seed=st.integers(0, 99))
def test_no_mask_of_as_many_entries_keeps_more_than_top_k(share, seed):
    update = some(seed)
    mask = TopK(share).mask(update)
    kept, every = np.abs(np.concatenate(gather(update, mask))), np.abs(flatten(update))
    assert kept.size == max(1, round(share * 90))
    assert np.array_equal(np.sort(kept), np.sort(every)[every.size - kept.size :])


def test_of_equals_top_k_takes_the_first():
    assert flatten_mask(TopK(0.1).mask(LIKE)).nonzero()[0].tolist() == list(range(9))


@given(times=st.floats(0, 4), seed=st.integers(0, 99))
def test_magnitude_keeps_what_exceeds_its_arrays_root_mean_square(times, seed):
    update = some(seed)
    mask = Magnitude(times).mask(update)
    for name, array in update.items():
        rms = np.sqrt(np.square(array, dtype=np.float64).mean())
        assert (np.abs(array[mask[name]]) >= times * rms * (1 - 1e-9)).all()
        assert (np.abs(array[~mask[name]]) <= times * rms * (1 + 1e-9)).all()


@given(share=st.floats(0.001, 1.0), axis=st.sampled_from([0, 1]), seed=st.integers(0, 99))
def test_structured_keeps_the_lines_of_largest_norm_and_vectors_whole(share, axis, seed):
    update = some(seed)
    mask = Structured(share, axis).mask(update)
    lines = mask["w"] if axis == 0 else mask["w"].T
    norms = np.linalg.norm(update["w"].astype(np.float64), axis=1 - axis)
    assert np.array_equal(lines.any(axis=1), lines.all(axis=1)), "whole lines"
    kept = lines.all(axis=1)
    assert kept.sum() == max(1, round(share * kept.size))
    assert norms[kept].min() >= norms[~kept].max(initial=0)
    assert mask["bias"].all()


@pytest.mark.parametrize("sparsifier", [TopK(0.2), Magnitude(1.0), Structured(0.2), Structured(0.2, 1), Nonzero()])
def test_empty_arrays_and_scalars_have_masks_too(sparsifier):
    update = {"none": np.zeros((0, 3), np.float32), "one": np.float32(2).reshape(()), "w": some(1)["w"]}
    mask = sparsifier.mask(update)
    assert {name: part.shape for name, part in mask.items()} == {n: a.shape for n, a in update.items()}
    assert all(part.dtype == np.bool_ for part in mask.values())
    assert all(part.size == 0 for part in sparsifier.mask({"none": update["none"]}).values())


def test_nonzero_loses_nothing():
    update = {"w": np.array([0, 1, 0, -2, -0.0], np.float32)}
    assert Nonzero().mask(update)["w"].tolist() == [False, True, False, True, False]


@pytest.mark.parametrize(
    "make",
    [
        lambda: TopK(0),
        lambda: DrawnMask(0, 0.0),
        lambda: TopK(1.1),
        lambda: Magnitude(-1),
        lambda: Structured(0.5, 2),
    ],
)
def test_impossible_options_are_refused(make):
    with pytest.raises(ConfigError):
        make()


# ---- masks on the wire -------------------------------------------------------------------------

BIG = {"w": np.zeros((64, 64), np.float32), "bias": np.zeros(64, np.float32)}


def on_the_wire(mask, last=None):
    flags, section = write_mask(mask, last)
    reader = Reader(memoryview(section))
    back = read_mask(reader, flags, BIG, last)
    reader.end()
    assert all(np.array_equal(back[name], mask[name]) for name in mask)
    return flags, len(section)


def test_an_even_mask_is_a_bitmap_and_a_thin_one_is_coded():
    assert on_the_wire(random_mask(BIG, 0.5, np.random.default_rng(0))) == (MASKED, 520)
    flags, size = on_the_wire(random_mask(BIG, 0.02, np.random.default_rng(0)))
    assert flags == MASKED | MASK_CODED
    assert size < 110


def test_a_mask_that_moved_a_little_travels_as_its_change():
    rng = np.random.default_rng(0)
    last = random_mask(BIG, 0.3, rng)
    growth = {name: rng.normal(size=a.shape).astype(np.float32) for name, a in BIG.items()}
    moved = prune_and_regrow(last, growth, growth, 0.02)
    flags, size = on_the_wire(moved, last)
    assert flags == MASKED | MASK_DELTA
    assert size < 110
    assert on_the_wire(last, last)[1] < 20
    assert on_the_wire(random_mask(BIG, 0.02, np.random.default_rng(9)), last)[0] == MASKED | MASK_CODED


def philox(seed, count):
    """Return `count` words of Philox4x64-10, key (seed, 0), counters 1, 2, …, as its authors wrote it down."""
    low, words = 2**64 - 1, []
    for counter in range(1, 1 + -(-count // 4)):
        x, key = [counter, 0, 0, 0], [seed, 0]
        for _ in range(10):
            first, second = x[0] * 0xD2E7470EE14C6C93, x[2] * 0xCA5A826395121157
            x = [second >> 64 ^ x[1] ^ key[0], second & low, first >> 64 ^ x[3] ^ key[1], first & low]
            key = [(key[0] + 0x9E3779B97F4A7C15) & low, (key[1] + 0xBB67AE8584CAA73B) & low]
        words += x
    return words[:count]


@pytest.mark.parametrize(("seed", "share"), [(0, 0.2), (2**64 - 1, 0.013), (7, 1.0), (9, 1e-9)])
def test_a_drawn_mask_is_what_the_specification_says(seed, share):
    like = {"a": np.zeros((7, 5)), "bias": np.zeros(9), "none": np.zeros((0, 3)), "b": np.zeros((2, 3, 4))}
    mask, words = DrawnMask(seed, share).mask(like), philox(seed, 35 + 24)
    for name, own in {"a": words[:35], "b": words[35:]}.items():
        count = max(1, int(share * len(own) + 0.5))
        assert set(np.flatnonzero(mask[name])) == set(sorted(range(len(own)), key=own.__getitem__)[:count])
    assert mask["bias"].all()
    assert mask["none"].shape == (0, 3)


def test_of_a_drawn_mask_only_the_seed_travels():
    update = {name: np.ones(a.shape, np.float32) for name, a in BIG.items()}
    drawn = DrawnMask(3, 0.2)
    frame = Codec().encode(update, mask=drawn)
    assert len(frame) == HEADER_SIZE + 16 + 4 * (819 + 64)
    opened = open_frame(frame, like=update)
    assert all(np.array_equal(opened.mask[name], part) for name, part in drawn.mask(BIG).items())
    assert opened.ideal_bits() == 32 * (819 + 64)
    assert all(np.array_equal(array, opened.mask[name]) for name, array in decode(frame, like=update).items())


def test_a_snapshot_has_no_drawn_mask():
    """Its names and shapes are the sender's: 16 bytes would call for an array of any size."""
    update = {"w": np.ones((8, 8), np.float32)}
    frame = Codec().encode(update, mask=DrawnMask(3, 0.2))
    schema = zlib.compress(b'[["w",[8,8]]]')
    with pytest.raises(WireFormatError, match="not drawn"):
        decode_snapshot(seal(0, MASKED | MASK_DRAWN, update, 13, [frame[HEADER_SIZE:]], schema))


def test_a_change_of_another_mask_is_refused():
    last = random_mask(BIG, 0.3, np.random.default_rng(0))
    update = {name: np.ones(a.shape, np.float32) for name, a in BIG.items()}
    frame = Codec().encode(update, mask=last, last_mask=last)
    other = random_mask(BIG, 0.3, np.random.default_rng(1))
    for wrong in (None, other, {"w": last["w"]}):
        with pytest.raises(SchemaMismatchError, match="does not have"):
            decode(frame, like=update, last_mask=wrong)
    assert np.array_equal(decode(frame, like=update, last_mask=last)["w"], last["w"])
    with pytest.raises(SchemaMismatchError):
        Codec().encode(update, mask=last, last_mask={"w": last["w"]})
