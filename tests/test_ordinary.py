"""What travels beside the frames comes back as it was, or is refused; nothing large is made of hostile bytes."""

import zlib

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord

from fedkit.errors import SchemaMismatchError, WireFormatError
from fedkit.ordinary import Ordinary, mean, pack_values, split, unpack_values

OWN = {
    "w": np.linspace(0, 1, 6, dtype=np.float16).reshape(2, 3),
    "bn.running_var": np.asarray([0.1, 0.2], np.float32),
    "n": np.asarray(2**62 + 1),
    "bias": np.asarray([1.5], np.float64),
    "flags": np.asarray([[True], [False]]),
}


def record(arrays):
    return ArrayRecord({name: Array(array) for name, array in arrays.items()})


def test_arrays_come_back_in_their_order_and_types_through_bytes():
    arrays, ordinary = split(record(OWN))
    assert list(arrays) == ["w", "bias"]
    assert all(array.dtype == np.float32 for array in arrays.values())
    again = Ordinary.unpack(ordinary.pack()).record(arrays)
    assert list(again) == list(OWN)
    for name, array in again.items():
        assert (array.numpy().dtype, array.numpy().tolist()) == (OWN[name].dtype, OWN[name].tolist())


def test_of_float32_alone_there_is_nothing_to_say():
    arrays, ordinary = split(record({"w": np.zeros(3, np.float32)}))
    assert ordinary.pack() == b""
    assert list(Ordinary.unpack(b"").record(arrays)) == ["w"]


def test_a_mean_is_weighted_and_rounded():
    like = {"n": np.asarray(0), "v": np.zeros(1, np.float32), "flag": np.asarray(False)}
    one = {"n": np.asarray(1), "v": np.ones(1, np.float32), "flag": np.asarray(True)}
    three = {"n": np.asarray(4), "v": np.zeros(1, np.float32), "flag": np.asarray(False)}
    found = mean([(1.0, one), (2.0, three)], like)
    assert (found["n"].tolist(), found["n"].dtype, found["flag"].tolist()) == (3, like["n"].dtype, False)
    assert found["v"][0] == pytest.approx(1 / 3)


@pytest.fixture(scope="module")
def beside():
    return split(record(OWN))[1].beside


def test_a_client_s_own_values_come_back_exactly(beside):
    found = unpack_values(pack_values(beside, beside), beside)
    assert found["n"] == 2**62 + 1
    assert all((found[name] == beside[name]).all() for name in beside)


def test_damaged_values_are_refused(beside):
    good = pack_values(beside, beside)
    for end in range(len(good)):
        with pytest.raises(WireFormatError):
            unpack_values(good[:end], beside)
    for bad in (zlib.compress(bytes(10**6)), zlib.compress(b""), b"", b"no zlib"):
        with pytest.raises(WireFormatError):
            unpack_values(bad, beside)
    with pytest.raises(WireFormatError, match="NaN"):
        unpack_values(pack_values({**beside, "bn.running_var": np.full(2, np.nan)}, beside), beside)


def test_damaged_instructions_are_refused():
    good = split(record(OWN))[1].pack()
    for end in range(1, len(good)):
        with pytest.raises(WireFormatError):
            Ordinary.unpack(good[:end])
    plain = zlib.decompress(good)
    for at in range(0, len(plain), 3):
        damaged = zlib.compress(plain[:at] + bytes([plain[at] ^ 0x55]) + plain[at + 1 :])
        try:
            Ordinary.unpack(damaged)
        except WireFormatError:
            continue


def test_an_app_that_leaves_one_out_is_told_which(beside):
    with pytest.raises(SchemaMismatchError, match="'n'"):
        pack_values({name: array for name, array in beside.items() if name != "n"}, beside)


@pytest.mark.parametrize("value", [np.iinfo(np.int64).max, np.iinfo(np.int64).min, 2**53 + 1])
def test_a_whole_number_that_all_agree_on_is_the_mean(value):
    own = {"n": np.asarray([value, 7])}
    assert mean([(10.0, own), (3.0, own)], own)["n"].tolist() == [value, 7]
    other = {"n": np.asarray([value, 9])}
    assert mean([(1.0, own), (1.0, other)], own)["n"].tolist() == [value, 8]


def test_a_mean_near_the_largest_whole_number_does_not_wrap_around():
    for dtype in (np.int64, np.uint64, np.int32, np.uint8):
        most = np.iinfo(dtype).max
        found = mean(
            [(1.0, {"n": np.asarray([most], dtype)}), (1.0, {"n": np.asarray([most - 1], dtype)})],
            {"n": np.asarray([0], dtype)},
        )
        assert float(found["n"][0]) == pytest.approx(float(most), rel=1e-2)


def test_an_array_in_a_module_keeps_its_own_type_beside_one_of_the_same_last_name():
    own = {"kernel": np.ones(2, np.float16), "dense/kernel": np.asarray([1.0001, 2.0002], np.float32)}
    arrays, ordinary = split(record(own))
    again = ordinary.record(arrays)
    assert {name: array.numpy().dtype for name, array in again.items()} == {n: a.dtype for n, a in own.items()}
    assert ordinary.dtype("slot-0/kernel") == ordinary.dtype("cluster-3/kernel") == "float16"


def test_a_mean_of_many_half_precision_values_is_not_rounded_on_the_way():
    values = [(1.0, {"v": np.asarray([1.0 + 0.01 * (-1) ** i], np.float16)}) for i in range(1000)]
    assert mean(values, values[0][1])["v"][0] == pytest.approx(1.0, abs=1e-3)
