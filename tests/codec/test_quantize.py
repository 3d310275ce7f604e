"""A table of quantizers × the laws that all obey; then each one's own law, as its docstring states it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedkit.codec.baselines import Blocks, BlocksGroup, Qsgd, Sign
from fedkit.codec.entropy_constrained import DesignedGroup, EntropyConstrained
from fedkit.codec.packing import pack_levels, unpack_levels
from fedkit.codec.quantize import AquilaMidTread, MidTreadGroup, ZeroMidTread, adaptive_bits
from fedkit.codec.rotation import BLOCK, Eden, RotatedGroup, padded_size, rotate
from fedkit.codec.sections import Reader
from fedkit.codec.signs import SignsGroup
from fedkit.codec.wire import Codec, decode
from fedkit.errors import ConfigError, WireFormatError

OTHERS = [
    AquilaMidTread(),
    AquilaMidTread(max_bits=4),
    ZeroMidTread(),
    ZeroMidTread(4, 4),
    ZeroMidTread(16, 16),
    Qsgd(2),
    Qsgd(4),
    Qsgd(16),
    Sign(),
    Blocks(2, 8),
    Blocks(4),
    Blocks(8, 1),
    Blocks(16, 65535),
    Eden(1),
    Eden(2),
    Eden(3, unbiased=True),
    Eden(4),
]
OURS = [EntropyConstrained(rate) for rate in (0.05, 0.3, 1, 1.05, 2.5, 8)]
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)  # up to the largest, down to subnormals
VALUES = arrays(np.float32, st.integers(0, 40), elements=FINITE)
MODERATE = arrays(np.float32, st.integers(0, 40), elements=st.floats(-(2.0**60), 2.0**60, width=32))

few = settings(max_examples=25, deadline=None)  # for each quantizer
every_quantizer = pytest.mark.parametrize("quantizer", OTHERS + OURS, ids=repr)


def quantize(quantizer, values, seed=0):
    return quantizer.quantize([values], np.random.default_rng(seed))


def roundtrip(quantizer, values, seed=0):
    group, levels = quantize(quantizer, values, seed)
    return group.dequantize(levels).astype(np.float64)


def lost(quantizer, values, seed=0):
    """Return the share of the squared norm that is lost."""
    values = values.astype(np.float64)
    return (
        np.square(values - roundtrip(quantizer, values.astype(np.float32), seed)).sum() / np.square(values).sum()
    )


def norm(values):
    return np.linalg.norm(np.asarray(values, np.float64))


# ---- what all obey -----------------------------------------------------------------------------


@every_quantizer
@few
@given(values=VALUES)
def test_count_and_dtype_are_kept_and_levels_fit_their_bits(quantizer, values):
    group, levels = quantize(quantizer, values)
    assert levels.dtype == np.uint16
    assert levels.size == group.num_levels
    assert int(levels.max(initial=0)) < 2**group.bits
    decoded = group.dequantize(levels)
    assert decoded.shape == values.shape
    assert decoded.dtype == np.float32
    assert np.isfinite(decoded).all()


@every_quantizer
@few
@given(parts=st.lists(VALUES, max_size=4))
def test_what_travels_gives_the_same_values(quantizer, parts):
    group, levels = quantizer.quantize(parts, np.random.default_rng(0))
    reader = Reader(memoryview(group.to_bytes()))
    read = type(group).read(reader.take, [part.size for part in parts])
    reader.end()
    assert (read.bits, read.num_levels) == (group.bits, group.num_levels)
    same = unpack_levels(pack_levels(levels, group.bits), levels.size, group.bits)
    assert np.array_equal(read.dequantize(same), group.dequantize(levels))
    assert read.dequantize(same).size == sum(part.size for part in parts)


@every_quantizer
@few
@given(count=st.integers(0, 300))
def test_zeros_stay_zeros(quantizer, count):
    assert not roundtrip(quantizer, np.zeros(count, np.float32)).any()


@every_quantizer
@pytest.mark.parametrize("size", [1e-45, 1e-40, 1e-30, 1e-6, 1, 1e6, 1e30, 3.4028235e38])
def test_frames_carry_values_of_any_size(quantizer, size):
    values = (np.random.default_rng(0).uniform(-1, 1, 300) * size).astype(np.float32)
    update = {"none": values[:0], "one": values[0], "rest": values[1:].reshape(13, 23), "empty": np.zeros((0, 4))}
    decoded = decode(Codec(quantizer).encode(update, rng=np.random.default_rng(0)), like=update)
    assert [a.shape for a in decoded.values()] == [(0,), (), (13, 23), (0, 4)]
    assert all(np.isfinite(a).all() for a in decoded.values())


@every_quantizer
@pytest.mark.parametrize("value", [1.0, -3e-3, 2.5e4])
def test_one_value_alone_comes_back_unless_the_rate_is_too_low_for_it(quantizer, value):
    decoded = roundtrip(quantizer, np.array([value], np.float32))
    unsent = isinstance(quantizer, EntropyConstrained) and not decoded.any()
    assert unsent or decoded == pytest.approx(value, rel=1 / 1024)


@every_quantizer
def test_size_does_not_matter(quantizer):
    """Scaled by a power of two, values lose the same share; only the scales of `Blocks` have a range."""
    values = np.random.default_rng(1).laplace(size=1000).astype(np.float32)
    shares = [lost(quantizer, values * np.float32(2.0**power)) for power in (0, -10, 5, -90, 90)]
    assert shares[:3] == pytest.approx([shares[0]] * 3, rel=1e-2)
    if not isinstance(quantizer, Blocks):
        assert shares == pytest.approx([shares[0]] * 5, rel=1e-2)


# ---- AQUILA ------------------------------------------------------------------------------------


@given(values=VALUES)
def test_aquila_errs_by_at_most_half_a_step(values):
    group, levels = quantize(AquilaMidTread(), values)
    half_step = group.scale / (2**group.bits - 1) if group.bits else 0
    error = np.abs(values.astype(np.float64) - group.dequantize(levels))
    assert (error <= half_step * (1 + 1e-6) + 1e-45).all()


@given(values=VALUES, bits=st.integers(2, 8))
def test_zero_grid_errs_by_half_a_step_inside_its_scale_and_by_the_excess_outside(values, bits):
    group, levels = quantize(ZeroMidTread(bits, bits), values)
    if group.bits == 0:
        return
    error = np.abs(values.astype(np.float64) - group.dequantize(levels))
    half_step = group.scale / (2 ** (bits - 1) - 1) / 2
    excess = np.maximum(np.abs(values.astype(np.float64)) - group.scale, 0)
    assert (error <= np.maximum(half_step, excess) * (1 + 1e-6) + 1e-45).all()


@given(values=MODERATE, bits=st.integers(2, 8))
def test_zero_grid_never_grows_an_error_beyond_the_entry_and_shrinks_some(values, bits):
    values = np.where(np.abs(values) < 1e-30, np.float32(0), values)
    error = np.abs(values.astype(np.float64) - roundtrip(ZeroMidTread(bits, bits), values))
    assert (error <= np.abs(values) * (1 + 1e-6)).all()
    assert not values.any() or (error < np.abs(values)).any()


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_values_on_the_zero_grid_do_not_move(bits):
    quantizer = ZeroMidTread(bits, bits)
    once = roundtrip(quantizer, np.random.default_rng(0).normal(size=500).astype(np.float32))
    np.testing.assert_allclose(roundtrip(quantizer, once.astype(np.float32)), once, rtol=1e-6)


@pytest.mark.parametrize(
    ("values", "bits"),
    [([1, -1, 1, -1], 1), ([1, 0, 0, 0], 1), ([1] + [0] * 8, 2), ([1] + [0] * 48, 3), ([5.0], 1)],
)
def test_adaptive_bits_is_the_closed_form(values, bits):
    v = np.array(values, np.float32)
    assert adaptive_bits(v, 1, 16) == bits
    assert bits == int(np.floor(np.log2(np.abs(v).max() * np.sqrt(v.size) / np.linalg.norm(v) + 1)))


def test_published_grid_has_no_zero_and_the_working_one_has():
    values = np.array([1, -1, 0.001, 0], np.float32)
    assert (roundtrip(AquilaMidTread(), values) != 0).all()
    assert (roundtrip(ZeroMidTread(), values)[2:] == 0).all()


def test_zero_grid_beats_the_published_one_on_what_adam_makes():
    """Entries of almost equal size: b* is 1, and ±R for all of them is far off as soon as some are small."""
    rng = np.random.default_rng(0)
    values = (rng.choice([-1, 1], 2000) * rng.uniform(0, 1, 2000)).astype(np.float32)
    errors = [norm(values - roundtrip(q, values)) for q in (AquilaMidTread(), ZeroMidTread())]
    assert errors[1] < 0.6 * errors[0]


# ---- QSGD, sign, blocks ------------------------------------------------------------------------


@given(values=VALUES, bits=st.integers(2, 16), seed=st.integers(0, 99))
def test_qsgd_errs_by_less_than_a_step(values, bits, seed):
    step = norm(values) / (2 ** (bits - 1) - 1)
    error = np.abs(values.astype(np.float64) - roundtrip(Qsgd(bits), values, seed))
    assert (error <= step * (1 + 1e-6) + np.abs(values) * 1e-7 + 1e-45).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_qsgd_is_unbiased(bits):
    values = np.random.default_rng(0).normal(size=50).astype(np.float32)
    draws = np.array([roundtrip(Qsgd(bits), values, seed) for seed in range(2000)])
    step = norm(values) / (2 ** (bits - 1) - 1)
    assert (np.abs(draws.mean(axis=0) - values) < 5 * step / 2 / np.sqrt(2000) + 1e-6).all()


@given(values=MODERATE)
def test_the_sign_has_its_energy_identity(values):
    values = np.where(np.abs(values) < 1e-15, np.float32(0), values).astype(np.float64)
    error = np.square(values - roundtrip(Sign(), values.astype(np.float32))).sum()
    energy = np.square(values).sum()
    assert error == pytest.approx(energy - np.abs(values).sum() ** 2 / max(values.size, 1), abs=1e-6 * energy)
    assert error < energy or not values.any()


@given(
    values=arrays(np.float32, st.integers(0, 60), elements=st.floats(-65504, 65504, width=32)),
    bits=st.integers(2, 16),
    block=st.integers(1, 20),
)
def test_blocks_err_by_half_a_step_of_their_own(values, bits, block):
    decoded = roundtrip(Blocks(bits, block), values)
    for start in range(0, values.size, block):
        part = values[start : start + block].astype(np.float64)
        peak = np.abs(part).max()
        if peak >= 6.2e-5:
            bound = peak / (2**bits - 2) * (1 + 1 / 1024) + peak / 1024
            assert (np.abs(part - decoded[start : start + block]) <= bound).all()


# ---- EDEN --------------------------------------------------------------------------------------

ONE_HOT = np.zeros(3 * BLOCK, np.float32)
ONE_HOT[[5, BLOCK + 9, 2 * BLOCK + 1]] = 1, -2, 7
VECTORS = {
    "gaussian": np.random.default_rng(0).normal(size=50_000).astype(np.float32),
    "heavy tails": np.random.default_rng(0).standard_t(2, size=50_000).astype(np.float32),
    "constant": np.full(50_000, 0.3, np.float32),
}


@pytest.mark.parametrize("name", VECTORS)
@pytest.mark.parametrize(("bits", "share"), [(1, 0.3634), (2, 0.1175), (3, 0.0345), (4, 0.0095)])
def test_eden_loses_what_a_normal_distribution_does_whatever_the_vector(bits, share, name):
    assert lost(Eden(bits), VECTORS[name]) == pytest.approx(share, rel=0.1 if name == "heavy tails" else 0.04)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_eden_keeps_a_single_entry_of_a_block(bits):
    """Rotated, it is of one size everywhere: exactly a centre, once scaled."""
    assert lost(Eden(bits), ONE_HOT) < 1e-9


@pytest.mark.parametrize("bits", [1, 2])
def test_unbiased_eden_is(bits):
    values = np.random.default_rng(1).laplace(size=256).astype(np.float32)
    quantizer = Eden(bits, unbiased=True)
    mean = np.mean([roundtrip(quantizer, values, seed) for seed in range(3000)], axis=0)
    assert norm(mean - values) < 3 * np.sqrt(lost(quantizer, values) / 3000) * norm(values)
    assert mean @ values == pytest.approx(values @ values, rel=0.01)


@given(count=st.integers(0, 3 * BLOCK), seed=st.integers(0, 2**32 - 1))
def test_the_rotation_keeps_lengths_and_has_its_inverse(count, seed):
    values = np.random.default_rng(seed).normal(size=padded_size(count)).astype(np.float32)
    rotated = rotate(values, seed)
    assert norm(rotated) == pytest.approx(norm(values), rel=1e-5)
    np.testing.assert_allclose(rotate(rotated, seed, back=True), values, atol=1e-5)
    assert np.array_equal(rotate(values, seed), rotated)
    assert count < 64 or not np.array_equal(rotate(values, seed ^ 1), rotated)


def test_the_rotation_is_orthonormal():
    matrix = np.array([rotate(row, 3) for row in np.eye(64, dtype=np.float32)])
    np.testing.assert_allclose(matrix @ matrix.T, np.eye(64), atol=1e-6)


# ---- ours --------------------------------------------------------------------------------------


@few
@given(values=VALUES, rate=st.floats(0.05, 8))
def test_ours_never_loses_more_than_there_is(values, rate):
    decoded = roundtrip(EntropyConstrained(rate), values)
    assert norm(values - decoded) <= norm(values) * (1 + 1e-6) + 1e-44


RNG = np.random.default_rng(5)
DATA = {
    "gaussian": RNG.normal(size=20_000),
    "laplace": RNG.laplace(size=20_000),
    "uniform": RNG.uniform(-1, 1, size=20_000),
    "two points": RNG.choice([-1, 1], size=20_000),
}
RIVALS = [q for q in OTHERS if not isinstance(q, Qsgd) or q.bits < 9]


@pytest.mark.parametrize("name", DATA)
@pytest.mark.parametrize("rival", RIVALS, ids=repr)
def test_ours_errs_no_more_than_any_other_at_the_same_bytes(rival, name):
    update = {"w": DATA[name].astype(np.float32)}
    theirs = Codec(rival).encode(update, rng=np.random.default_rng(0))
    rate = 8 * len(theirs) / update["w"].size
    if not 0.05 <= rate <= 8:
        pytest.skip("a rate that ours does not have")
    ours = Codec(EntropyConstrained(rate)).encode(update)
    assert len(ours) <= 1.01 * len(theirs) + 16
    errors = [np.square(update["w"] - decode(frame, like=update)["w"]).sum() for frame in (ours, theirs)]
    assert errors[0] <= 1.01 * errors[1] + 1e-6 * np.square(update["w"]).sum()


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: ZeroMidTread(1),
        lambda: ZeroMidTread(5, 4),
        lambda: AquilaMidTread(17),
        lambda: Qsgd(1),
        lambda: Blocks(1),
        lambda: Eden(5),
    ],
)
def test_impossible_bits_are_refused(make):
    with pytest.raises(ConfigError, match="bits"):
        make()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Blocks(4, 0), "block"),
        (lambda: EntropyConstrained(0.04), "rate"),
        (lambda: EntropyConstrained(8.1), "rate"),
        (lambda: EntropyConstrained(float("nan")), "rate"),
    ],
)
def test_other_impossible_options_are_refused(make, match):
    with pytest.raises(ConfigError, match=match):
        make()


@pytest.mark.parametrize(
    ("group", "level"),
    [
        (MidTreadGroup(1, 1.0, 1), 1),
        (MidTreadGroup(2, 1.0, 1), 3),
        (DesignedGroup(1, 1.0, 1.0, 1), 3),
        (RotatedGroup(2, 0, np.ones(1, np.float32), 1), 4),
        (BlocksGroup(3, 4, np.ones(1, np.float16), 1), 7),
        (SignsGroup(np.ones(1, np.float32), np.ones(1, np.bool_), (1,)), 2),
    ],
    ids=repr,
)
def test_levels_outside_the_grid_are_refused(group, level):
    with pytest.raises(WireFormatError):
        group.dequantize(np.array([level], np.uint16))
