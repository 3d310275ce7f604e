"""A table of quantizers × the laws each must obey."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from fedkit.codec.protocol import Quantized
from fedkit.codec.quantize import AquilaMidTread, MidTreadGroup, ZeroMidTread, adaptive_bits
from fedkit.errors import ConfigError, WireFormatError

QUANTIZERS = [
    AquilaMidTread(),
    AquilaMidTread(max_bits=4),
    ZeroMidTread(),
    ZeroMidTread(4, 4),
    ZeroMidTread(16, 16),
]
VALUES = arrays(np.float32, st.integers(0, 40), elements=st.floats(-(2.0**100), 2.0**100, width=32))

every_quantizer = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=repr)


RNG = np.random.default_rng(0)


def quantize(quantizer, values) -> Quantized:
    return quantizer.quantize([values], RNG)


def roundtrip(quantizer, values):
    group, levels = quantize(quantizer, values)
    return group.dequantize(levels)


@every_quantizer
@given(values=VALUES)
def test_quantize_keeps_count_and_dtype_and_fits_its_bits(quantizer, values):
    group = quantizer.quantize(values)
    assert roundtrip(quantizer, values).shape == values.shape
    assert roundtrip(quantizer, values).dtype == np.float32
    assert group.levels.max(initial=0) < 2**group.bits
    assert on_the_wire(group) == group or np.array_equal(on_the_wire(group).levels, group.levels)
    assert group.scale == np.float32(group.scale), "the scale must survive as float32"


@every_quantizer
@given(count=st.integers(0, 9))
def test_quantize_zeros_takes_no_bits(quantizer, count):
    group = quantizer.quantize(np.zeros(count, np.float32))
    assert group.bits == 0
    assert not dequantize(quantizer.grid, group).any()


@given(values=VALUES)
def test_aquila_errs_by_at_most_half_a_step(values):
    group = AquilaMidTread().quantize(values)
    half_step = group.scale / (2**group.bits - 1) if group.bits else 0
    error = np.abs(values.astype(np.float64) - dequantize(1, group))
    assert (error <= half_step * (1 + 1e-6)).all()


@given(values=VALUES, bits=st.integers(2, 8))
def test_zero_grid_errs_by_half_a_step_inside_its_scale_and_by_the_excess_outside(values, bits):
    group = ZeroMidTread(bits, bits).quantize(values)
    if group.bits == 0:
        return
    error = np.abs(values.astype(np.float64) - dequantize(2, group))
    half_step = group.scale / (2 ** (bits - 1) - 1) / 2
    excess = np.maximum(np.abs(values.astype(np.float64)) - group.scale, 0)
    assert (error <= np.maximum(half_step, excess) * (1 + 1e-6) + 1e-45).all()


@given(values=VALUES, bits=st.integers(2, 8))
def test_zero_grid_never_grows_an_error_beyond_the_entry_and_shrinks_some(values, bits):
    coded = dequantize(2, ZeroMidTread(bits, bits).quantize(values)).astype(np.float64)
    error = np.abs(values.astype(np.float64) - coded)
    assert (error <= np.abs(values) * (1 + 1e-6)).all()
    assert not values.any() or (error < np.abs(values)).any()


@pytest.mark.parametrize("bits", [2, 3, 8, 16])
def test_values_on_the_zero_grid_do_not_move(bits):
    quantizer = ZeroMidTread(bits, bits)
    once = roundtrip(quantizer, np.random.default_rng(0).normal(size=500).astype(np.float32))
    np.testing.assert_allclose(roundtrip(quantizer, once), once, rtol=1e-6)


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
    errors = [np.linalg.norm(values - roundtrip(q, values)) for q in (AquilaMidTread(), ZeroMidTread())]
    assert errors[1] < 0.6 * errors[0]


@pytest.mark.parametrize("make", [lambda: ZeroMidTread(1), lambda: ZeroMidTread(5, 4), lambda: AquilaMidTread(17)])
def test_impossible_bits_are_refused(make):
    with pytest.raises(ConfigError, match="bits"):
        make()


@pytest.mark.parametrize(
    "group", [Quantized(1, 1.0, np.array([1], np.uint16)), Quantized(2, 1.0, np.array([3], np.uint16))]
)
def test_levels_outside_the_grid_are_refused(group):
    with pytest.raises(WireFormatError):
        dequantize(2, group)


def test_unknown_grid_is_refused():
    with pytest.raises(WireFormatError, match="grid"):
        dequantize(9, Quantized(2, 1.0, np.array([0], np.uint16)))
