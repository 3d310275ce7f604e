import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkit.codec.packing import pack_levels, pack_mask, packed_size, unpack_levels, unpack_mask
from fedkit.errors import WireFormatError


@given(bits=st.integers(0, 16), data=st.data())
def test_levels_round_trip_in_exactly_the_documented_size(bits, data):
    levels = np.array(data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=50)), np.uint16)
    packed = pack_levels(levels, bits)
    assert len(packed) == packed_size(len(levels), bits) == -(-len(levels) * bits // 8)
    assert np.array_equal(unpack_levels(packed, len(levels), bits), levels)


@given(mask=st.lists(st.booleans(), max_size=50))
def test_masks_round_trip(mask):
    mask = np.array(mask, np.bool_)
    assert np.array_equal(unpack_mask(pack_mask(mask), mask.size), mask)


def test_levels_of_another_length_are_refused():
    with pytest.raises(WireFormatError, match="expected 2 bytes"):
        unpack_levels(b"123", 5, 3)


def test_padding_must_be_zero():
    with pytest.raises(WireFormatError, match="padding"):
        unpack_levels(b"\xff", 5, 1)
