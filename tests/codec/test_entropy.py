"""Levels ⇄ about their entropy in bytes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit.codec.entropy import decode_levels, encode_levels, order0_bits
from fedkit.codec.protocol import Quantized
from fedkit.codec.quantize import AquilaMidTread, MidTreadGroup
from fedkit.codec.sections import CODED, write_groups
from fedkit.errors import WireFormatError

RNG = np.random.default_rng(0)


def check(parts):
    data = encode_levels(parts)
    decoded = decode_levels(memoryview(data), [part.size for part in parts])
    assert all(part.dtype == np.uint16 for part in decoded)
    assert all(np.array_equal(*pair) for pair in zip(decoded, parts, strict=True))
    return data


def skewed(top, size, sharpness):
    """Return levels 0 to `top`, near its middle the more, the larger `sharpness`."""
    spread = (top + 1) / (1 + sharpness)
    return np.clip(RNG.laplace(top / 2, spread / 4 + 1e-9, size).round(), 0, top).astype(np.uint16)


@settings(deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 65535), st.integers(0, 50)), max_size=12),
)
def test_any_levels_in_any_parts_come_back(shapes):
    check([skewed(top, size, sharpness) for size, top, sharpness in shapes])


@pytest.mark.parametrize("size", [1, 7, 8, 9, 2**8 * 120 - 1, 2**8 * 120, 2**8 * 120 + 1])
@pytest.mark.parametrize("top", [0, 1, 2, 3, 5, 15, 16, 255, 256, 511, 4095, 65535])
def test_sizes_around_symbols_and_chunks(size, top):
    check([np.minimum(RNG.integers(0, top + 1, size), RNG.integers(0, top + 1, size)).astype(np.uint16)])


@pytest.mark.parametrize("top", [1, 2, 6, 14, 100, 255, 1000, 20_000, 65535])
@pytest.mark.parametrize("sharpness", [1, 3, 20])
def test_the_size_is_within_a_percent_of_the_entropy(top, sharpness):
    levels = skewed(top, 100_000, sharpness)
    most = 1.01 if top < 256 else 1.05  # of more levels, the low bits are not coded
    table = 2 + min(256, int(levels.max()) + 1)
    assert 8 * (len(check([levels])) - table - 16) <= most * order0_bits(levels)


def test_rare_levels_cost_their_share():
    levels = np.where(RNG.random(200_000) < 0.01, RNG.integers(0, 3, 200_000), 1).astype(np.uint16)
    assert 8 * len(check([levels])) <= 1.01 * order0_bits(levels) + 8 * 16


def test_a_sample_of_millions_misses_no_level():
    levels = np.full(2**22, 5, np.uint16)
    levels[[12_345, 3_000_000]] = 0, 250
    assert len(check([levels, levels[:10]])) < 20_000


def test_parts_that_differ_have_tables_of_their_own():
    parts = [np.full(5000, 3, np.uint16), RNG.integers(0, 2, 5000).astype(np.uint16), skewed(14, 5000, 9)]
    assert 8 * len(check(parts)) < 1.02 * sum(map(order0_bits, parts)) + 8 * 80


def test_parts_that_are_alike_share_a_table():
    parts = [skewed(14, 200, 9) for _ in range(50)]
    assert len(check(parts)) < order0_bits(np.concatenate(parts)) / 8 * 1.02 + 40


def test_levels_of_one_value_take_no_stream():
    assert len(check([np.full(10**6, 7, np.uint16)])) == 1 + 1 + 3


def test_whichever_is_smaller_travels():
    even = Quantized(MidTreadGroup(4, 1.0, 64), (RNG.permutation(64) % 15).astype(np.uint16))
    uneven = Quantized(MidTreadGroup(4, 1.0, 5000), skewed(14, 5000, 30))
    assert write_groups([even], [64])[0] == 0
    assert sum(map(len, write_groups([even], [64])[1])) == 5 + 32
    flags, sections = write_groups([uneven], [5000])
    assert flags == CODED
    assert sum(map(len, sections)) < 5 + 2500
    assert write_groups([AquilaMidTread().quantize([np.zeros(9, np.float32)], RNG)], [9])[0] == 0


@pytest.mark.parametrize(
    ("data", "sizes"),
    [
        ("", [3]),
        ("00", [3]),
        ("0900 0000 00", [3]),  # shift above 8
        ("0002 0000 00", [3]),  # padding of the bitmap
        ("0000 0000", [3]),  # no table
        ("0000 00ff 00", [3]),  # a table cut short
        ("0000 0000 ff", [3]),  # a table of nothing
        ("0000 ff01 0000", [3]),  # levels above 255
        ("0000 0001 0000 010203", [3]),  # part of a word
        ("0000 0001 0000 00000000", [3]),  # a last word of zero
        ("0000 0000 00 01000000", [3]),  # a stream that is not needed
        ("0000 0001 0000" + "01000000" * 6, [3]),  # more than three levels can take
        ("0100 0000 00", [9]),  # no low bits
    ],
)
def test_forged_sections_are_refused(data, sizes):
    with pytest.raises(WireFormatError):
        decode_levels(memoryview(bytes.fromhex(data)), sizes)
