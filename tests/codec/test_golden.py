"""Golden frames: what was once sent is read for ever."""

import numpy as np
import pytest

from fedkit.codec.entropy import decode_levels, encode_levels
from fedkit.codec.sections import CODED, MASK_CODED, MASK_DELTA, MASK_DRAWN, MASKED, PER_ARRAY
from fedkit.codec.wire import decode, read_header
from tests.helpers import ans
from tests.helpers.golden import CASES, SNAPSHOTS, load, read

GOLDEN = load()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden_frames_decode_for_ever(name):
    frame, known, values = GOLDEN[name]
    decoded = read(name, frame, known)
    assert list(decoded) == list(values)
    for key, array in decoded.items():
        assert array.shape == known["like"][key].shape
        assert array.ravel().tolist() == values[key]


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.exact])
def test_golden_frames_are_what_encode_makes(name):
    assert CASES[name].encode().hex() == GOLDEN[name][0].hex()


@pytest.mark.parametrize("name", ["rotated-packed", "rotated-long"])
def test_where_the_last_bit_of_a_sum_decides_frames_come_close(name):
    """The scales are sums, which machines add up in their own order; the seed of a rotation is numpy's."""
    case, (golden, _, values) = CASES[name], GOLDEN[name]
    frame = case.encode()
    assert len(frame) == len(golden)
    decoded = decode(frame, like=case.update)
    exact, before = (np.concatenate([np.ravel(a) for a in arrays.values()]) for arrays in (case.update, values))
    now = np.concatenate([a.ravel() for a in decoded.values()])
    assert np.linalg.norm(exact - now) == pytest.approx(np.linalg.norm(exact - before), rel=0.1)


def test_there_is_one_of_every_grid_and_flag():
    assert set(GOLDEN) == {*CASES, *SNAPSHOTS}
    headers = [read_header(frame) for frame, *_ in GOLDEN.values()]
    assert {header.grid for header in headers} == set(range(7))
    for flag in (PER_ARRAY, MASKED, CODED, MASK_CODED, MASK_DELTA, MASK_DRAWN):
        assert any(header.flags & flag for header in headers)


def test_the_entropy_coders_numbers_never_drift():
    """Bytes from tables of odd frequencies: a model rounded in another way would give other levels."""
    section = bytes.fromhex(SECTION)
    parts = decode_levels(memoryview(section), [40, 0, 7, 300])
    state, levels = 1, []
    for top in [5] * 40 + [700] * 7 + [13] * 300:
        state = state * 48271 % (2**31 - 1)
        levels.append(min(state % (top + 1), state // 7 % (top + 1)))
    assert np.concatenate(parts).tolist() == levels


SECTION = """
0200008a000d1a4eff77ffffffffffffffffffffffffffffffffffffffffffffffffffffff7777ffffffff77ffffffffffff
ffffffffffffffffffffffffffffffffffffff77ffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff
ffffffffffffffffffffffffffffffffff77ffffffffffffffffffffffffffffffffffffffffffffffff774154d5fc55e007
9dc20fa8ad15e7de5e4597141b33d8b5436d5fbd5415c500b1c0c32c5cc9a3531737d5f3d257ff3f6fd7c31e73450c9d6c53
78f52594daec11d33d0def330f45359494e2fb554d40d8bf1342c65ca73588f1b89932fce8ddd0106a75caa4abd034a54879
2e559cbb90acb8a1fe4152cac13f7488da008f9e501a5d4ad763f1594ad5715a918aec84be554af6f37bfee5c1981e4a802e
318563043a9394000000
"""


@pytest.mark.parametrize("seed", range(40))
def test_coded_levels_are_what_the_specification_says(seed):
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(rng.integers(1, 6)):
        top, size = int(rng.choice([0, 1, 2, 5, 14, 100, 255, 3000])), int(rng.integers(0, 400))
        parts.append(np.minimum(rng.integers(0, top + 1, size), rng.integers(0, top + 1, size)).astype(np.uint16))
    section = encode_levels(parts)
    assert ans.decode(section, [part.size for part in parts]) == np.concatenate(parts).tolist()


def test_the_specification_reads_deflated_levels_too():
    frame, known, _ = GOLDEN["zero-deflated"]
    sizes = [array.size for array in known["like"].values()]
    section = frame[25 + 5 * len(sizes) :]
    assert section[0] >= 128
    parts = decode_levels(memoryview(section), sizes)
    assert ans.decode(section, sizes) == np.concatenate(parts).tolist()


def test_the_specification_reads_the_bytes_that_never_drift():
    sizes = [40, 0, 7, 300]
    section = bytes.fromhex(SECTION)
    assert ans.decode(section, sizes) == np.concatenate(decode_levels(memoryview(section), sizes)).tolist()
