"""The frame: round trips, sizes, golden bytes and hostile bytes."""

import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedkit.arrays import num_values
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.codec.snapshot import decode_snapshot, encode_snapshot
from fedkit.codec.wire import Codec, decode, open_frame, read_header
from fedkit.errors import CodecError, SchemaMismatchError, UnsupportedVersionError, WireFormatError
from tests.helpers import ans

CODECS = {"float32": Codec(), "aquila": Codec(AquilaMidTread()), "zero": Codec(ZeroMidTread())}
UPDATE = {
    "lora_A": np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4),
    "lora_B": np.array([[0.5, -0.25], [0, 2]], np.float32),
    "scalar": np.array(1.5, np.float32),
    "empty": np.zeros((0, 3), np.float32),
}
MASK = {name: np.arange(a.size).reshape(a.shape) % 3 == 0 for name, a in UPDATE.items()}

every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
named_arrays = st.dictionaries(
    st.text(max_size=5),
    arrays(
        np.float32,
        array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4),
        elements=st.floats(-(2.0**30), 2.0**30, width=32),
    ),
    max_size=4,
)


def frames():
    """One frame of every kind, by name."""
    for name, codec in CODECS.items():
        yield f"{name}-dense", codec.encode(UPDATE)
        yield f"{name}-masked", codec.encode(UPDATE, mask=MASK)
    yield "snapshot", encode_snapshot(UPDATE)


def read(name, data):
    return decode_snapshot(data) if name == "snapshot" else decode(data, like=UPDATE)


@every_codec
@given(update=named_arrays)
def test_round_trip_keeps_names_shapes_and_dtype(codec, update):
    decoded = decode(codec.encode(update), like=update)
    assert list(decoded) == list(update)
    assert all(decoded[n].shape == update[n].shape and decoded[n].dtype == np.float32 for n in update)


@given(update=named_arrays)
def test_float32_frames_and_snapshots_are_lossless(update):
    for decoded in (decode(Codec().encode(update), like=update), decode_snapshot(encode_snapshot(update))):
        assert list(decoded) == list(update)
        assert all(np.array_equal(decoded[name], update[name]) for name in update)


@every_codec
def test_masked_out_entries_are_zero_and_the_mask_comes_back(codec):
    frame = open_frame(codec.encode(UPDATE, mask=MASK), like=UPDATE)
    decoded, mask = frame.arrays(), frame.mask
    assert mask is not None
    for name in UPDATE:
        assert np.array_equal(mask[name], MASK[name])
        assert not decoded[name][~MASK[name]].any()
    if codec.quantizer is None:
        assert all(np.array_equal(decoded[n][MASK[n]], UPDATE[n][MASK[n]]) for n in UPDATE)


def test_sizes_are_those_of_the_specification():
    d, groups = num_values(UPDATE), len(UPDATE)
    kept = [int(m.sum()) for m in MASK.values()]
    assert len(Codec().encode(UPDATE)) == 25 + 4 * d
    assert len(Codec().encode(UPDATE, mask=MASK)) == 25 + -(-d // 8) + 4 * sum(kept)
    two_bits = Codec(ZeroMidTread(2, 2)).encode(UPDATE)
    assert len(two_bits) == 25 + 5 * groups + sum(-(-2 * a.size // 8) for a in UPDATE.values())


@every_codec
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused_with_the_array_named(codec, bad):
    with pytest.raises(CodecError, match="lora_B"):
        codec.encode(UPDATE | {"lora_B": np.array([[bad, 0], [0, 0]], np.float32)})


def test_nan_in_a_frame_is_refused_by_the_receiver():
    frame = bytearray(Codec().encode({"w": np.ones(1, np.float32)}))
    frame[-4:] = np.float32(np.nan).tobytes()
    with pytest.raises(WireFormatError):
        decode(_reseal(bytes(frame)), like={"w": np.ones(1, np.float32)})


@pytest.mark.parametrize(
    "other",
    [
        {"lora_A": np.zeros((4, 3), np.float32)},
        {"other": np.zeros((3, 4), np.float32)},
        {"lora_A": np.zeros((3, 4), np.float32), "more": np.zeros(1, np.float32)},
    ],
    ids=["shape", "name", "count"],
)
def test_another_schema_is_an_error(other):
    frame = Codec().encode({"lora_A": np.zeros((3, 4), np.float32)})
    with pytest.raises(SchemaMismatchError, match="LoRA rank"):
        decode(frame, like=other)


def test_another_version_is_an_error():
    frame = bytearray(Codec().encode(UPDATE))
    frame[2] = 2
    with pytest.raises(UnsupportedVersionError, match="expected 1, got 2"):
        read_header(bytes(frame))


@pytest.mark.parametrize(("name", "data"), list(frames()), ids=[name for name, _ in frames()])
def test_every_truncation_and_byte_flip_is_a_codec_error(name, data):
    for cut in range(len(data)):
        with pytest.raises(CodecError):
            read(name, data[:cut])
    for position in range(len(data)):
        mutant = bytearray(data)
        mutant[position] ^= 0x55
        with pytest.raises(CodecError):
            read(name, bytes(mutant))


@pytest.mark.parametrize(("name", "data"), list(frames()), ids=[name for name, _ in frames()])
def test_a_forged_checksum_still_gives_arrays_or_a_codec_error(name, data):
    rng = np.random.default_rng(0)
    for _ in range(400):
        mutant = bytearray(data)
        for position in rng.integers(3, len(data), size=rng.integers(1, 4)):
            mutant[position] = rng.integers(256)
        try:
            decoded = read(name, _reseal(bytes(mutant)))
        except CodecError:
            continue
        assert all(np.isfinite(a).all() for a in decoded.values())


def test_a_frame_that_claims_much_allocates_little():
    bomb = bytearray(encode_snapshot({"w": np.zeros(3, np.float32)}))
    text = b'[["w",[4000000000,4000000000]]]'
    schema = zlib.compress(text)
    bomb = bytearray(bytes(bomb[:25]) + schema + bytes(12))
    bomb[17:21] = len(schema).to_bytes(4, "little")
    tracemalloc.start()
    with pytest.raises(CodecError):
        decode_snapshot(_reseal(bytes(bomb)))
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def _reseal(frame: bytes) -> bytes:
    """Return the frame with a valid checksum, as a hostile sender would."""
    checksum = zlib.crc32(frame[25:], zlib.crc32(frame[:21]))
    return frame[:21] + checksum.to_bytes(4, "little") + frame[25:]


def test_the_example_of_the_specification_is_true():
    text = (Path(__file__).parents[2] / "fedkit" / "codec" / "WIRE.md").read_text()
    frame = bytes.fromhex(text.split("```hex\n")[1].split("```")[0])
    update = {"a": np.array([1, 9, -1], np.float32), "b": np.array([[0.5]], np.float32)}
    mask = {"a": np.array([True, False, True]), "b": np.array([[True]])}
    opened = open_frame(frame, like=update)
    decoded, kept = opened.arrays(), opened.mask
    assert decoded["a"].tolist() == [1.0, 0.0, -1.0]
    assert decoded["b"].tolist() == [[0.5]]
    assert kept is not None
    assert kept["a"].tolist() == [True, False, True]
    assert Codec(ZeroMidTread(2, 2)).encode(update, mask=mask) == frame


def test_the_coded_example_of_the_specification_is_true():
    text = (Path(__file__).parents[2] / "fedkit" / "codec" / "WIRE.md").read_text()
    frame = bytes.fromhex(text.split("```hex\n")[2].split("```")[0])
    update = {"w": np.zeros((8, 8), np.float32)}
    update["w"].ravel()[[3, 40]] = 1
    assert np.array_equal(decode(frame, like=update)["w"], update["w"])
    assert Codec(ZeroMidTread(2, 2)).encode(update) == frame
    state = int.from_bytes(frame[-4:], "little")
    assert (state, state % 2**24, state >> 24) == (1407369315, 14860387, 83)
    symbols, starts = ans.model([(1, 0), (2, 79)])
    assert ans.COSTS[79] == 547_500
    assert (symbols[16], symbols[128]) == ((1, 1, 1, 2, 1, 1, 1, 1), (2, 1, 1, 1, 1, 1, 1, 1))
    assert (starts[16], starts[17] - starts[16]) == (14754647, 423456)
    assert state % 2**24 - starts[16] == 105740
    assert ans.decode(frame[30:], [64]) == [2 if i in (3, 40) else 1 for i in range(64)]
