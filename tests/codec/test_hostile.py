"""Hostile bytes: what is not a frame raises CodecError, and nothing large is allocated for a false claim."""

import contextlib
import struct
import tracemalloc
import zlib

import numpy as np
import pytest

from fedkit.arrays import schema_digest
from fedkit.codec.baselines import Blocks, Qsgd, Sign
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.codec.rotation import Eden
from fedkit.codec.snapshot import decode_snapshot, encode_snapshot
from fedkit.codec.sparsify import TopK
from fedkit.codec.wire import Codec, decode
from fedkit.errors import CodecError
from tests.helpers.golden import load, read

GOLDEN = load()
RNG = np.random.default_rng(0)
LORA = {f"layer{i}": RNG.laplace(size=(24, 480)).astype(np.float32) for i in range(26)}  # 300,000 values

every_golden = pytest.mark.parametrize("name", GOLDEN)


def resealed(frame):
    """Return the frame with a valid checksum, as a hostile sender would."""
    checksum = zlib.crc32(frame[25:], zlib.crc32(frame[:21]))
    return frame[:21] + checksum.to_bytes(4, "little") + frame[25:]


def forged(grid, flags, like, body, count=None):
    count = sum(a.size for a in like.values()) if count is None else count
    return resealed(struct.pack("<2sBBB8sIII", b"fk", 1, grid, flags, schema_digest(like), count, 0, 0) + body)


def allocated(action):
    tracemalloc.start()
    try:
        action()
    except CodecError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


def limit(like):
    return 4 * sum(a.nbytes for a in like.values()) + 1_000_000


@every_golden
def test_every_truncation_is_a_codec_error(name):
    frame, known, _ = GOLDEN[name]
    for end in range(len(frame)):
        with pytest.raises(CodecError):
            read(name, frame[:end], known)
        if end >= 25:  # without its last words, a coded stream is one of other levels
            with contextlib.suppress(CodecError):
                decoded = read(name, resealed(frame[:end]), known)
                assert all(np.isfinite(array).all() for array in decoded.values())


@every_golden
def test_every_byte_flip_is_a_codec_error_or_with_a_forged_checksum_arrays(name):
    frame, known, _ = GOLDEN[name]
    for position in range(len(frame)):
        for change in (0x01, 0x55, 0x80, 0xFF):
            mutant = bytearray(frame)
            mutant[position] ^= change
            with pytest.raises(CodecError):
                read(name, bytes(mutant), known)
            try:
                decoded = read(name, resealed(bytes(mutant)), known)
            except CodecError:
                continue
            assert all(np.isfinite(array).all() for array in decoded.values())


@every_golden
def test_nothing_may_follow(name):
    frame, known, _ = GOLDEN[name]
    for more in (b"\0", b"\0\0\0\0", b"\1\0\0\0", bytes(4096)):
        with pytest.raises(CodecError):
            read(name, resealed(frame + more), known)


@every_golden
def test_flips_allocate_little(name):
    frame, known, _ = GOLDEN[name]
    for position in range(0, min(len(frame), 120), 3):
        mutant = bytearray(frame)
        mutant[position] ^= 0xFF
        data = resealed(bytes(mutant))
        assert allocated(lambda data=data: read(name, data, known)) <= limit(known["like"])


CODECS = [
    Codec(),
    Codec(None, TopK(0.3)),
    Codec(AquilaMidTread()),
    Codec(ZeroMidTread()),
    Codec(ZeroMidTread(16, 16)),
    Codec(Qsgd(8)),
    Codec(Sign()),
    Codec(Blocks(4)),
    Codec(Blocks(16, 1)),
    Codec(Eden(1)),
    Codec(Eden(4)),
    *(Codec(EntropyConstrained(rate)) for rate in (0.1, 0.9, 2, 8)),
    Codec(EntropyConstrained(1), TopK(0.1)),
    Codec(ZeroMidTread(12, 12), TopK(0.9)),
]


@pytest.mark.parametrize("codec", CODECS, ids=repr)
@pytest.mark.parametrize(
    "like", [LORA, {"w": np.concatenate([a.ravel() for a in LORA.values()])}], ids=["26", "1"]
)
def test_decoding_allocates_at_most_four_times_the_arrays(codec, like):
    frame = codec.encode(like, rng=np.random.default_rng(0))
    assert allocated(lambda: decode(frame, like=like)) <= limit(like)


FEW = {"w": np.zeros(3, np.float32), "v": np.zeros(2, np.float32)}
DEFLATED = zlib.compress(bytes(10**8))  # a hundred megabytes from a hundred kilobytes
FIVE = zlib.compress(b"\xff\xff")
CODED_ZEROS = bytes([0, 0, 0, 0, 0])  # no shift, no owners, a table of level 0
BOMBS = {
    "count": forged(0, 0, FEW, bytes(20), count=2**32 - 1),
    "widest levels": forged(2, 0, FEW, struct.pack("<Bf", 16, 1.0) + bytes(10)),
    "bits": forged(1, 0, FEW, struct.pack("<Bf", 255, 1.0) + bytes(200)),
    "half": forged(3, 0, FEW, struct.pack("<Hff", 32767, 1.0, 1.0) + b"\xfe\xff" * 5),
    "half coded": forged(3, 4, FEW, struct.pack("<Hff", 32767, 1.0, 1.0) + CODED_ZEROS),
    "half above": forged(3, 0, FEW, struct.pack("<Hff", 65535, 1.0, 1.0) + bytes(20)),
    "infinite step": forged(3, 4, FEW, struct.pack("<Hff", 1, 1.0, np.inf) + CODED_ZEROS),
    "steep": forged(3, 4, FEW, struct.pack("<Hff", 3, 3e38, 3e38) + CODED_ZEROS),
    "rotation of nothing": forged(4, 0, {"w": np.zeros(0, np.float32)}, struct.pack("<BI", 1, 0)),
    "scale of a rotation": forged(4, 0, FEW, struct.pack("<BIf", 1, 0, np.nan) + bytes(1)),
    "block of 0": forged(5, 0, FEW, struct.pack("<BH", 4, 0) + bytes(50)),
    "block of all": forged(5, 0, FEW, struct.pack("<BHe", 16, 65535, 1.0) + b"\x01\x00" * 5),
    "scale of a block": forged(5, 0, FEW, struct.pack("<BHe", 2, 65535, -1.0) + bytes(2)),
    "signs": forged(6, 0, FEW, b"\x03" + b"\x80\x7f\x00\x00" + b"\x1f"),
    "shift": forged(3, 4, FEW, struct.pack("<Hff", 1, 1.0, 1.0) + b"\x09" + CODED_ZEROS),
    "owners": forged(3, 4, FEW, struct.pack("<Hff", 1, 1.0, 1.0) + b"\x00\xff" + bytes(900)),
    "deflate": forged(3, 4, FEW, struct.pack("<Hff", 1, 1.0, 1.0) + b"\x80\0\0\1\0\0" + DEFLATED[2:-4]),
    "deflated rank": forged(3, 4, FEW, struct.pack("<Hff", 1, 1.0, 1.0) + b"\x80\0\0\0\0" + FIVE[2:-4]),
    "stream": forged(3, 4, FEW, struct.pack("<Hff", 1, 1.0, 1.0) + b"\0\0\0\1\0\0" + b"\1" * 2_000_000),
    "coded mask": forged(0, 2 | 8, FEW, b"\xff\xff\xff\xff" + CODED_ZEROS + bytes(20)),
    "coded mask of twos": forged(0, 2 | 8, FEW, b"\5\0\0\0" + b"\0\0\2\0\0" + bytes(20)),
    "change of a mask": forged(0, 2 | 16, FEW, bytes(4) + b"\5\0\0\0" + CODED_ZEROS + bytes(20)),
    "two kinds of mask": forged(0, 2 | 8 | 16, FEW, b"\5\0\0\0" + CODED_ZEROS),
    "a kind of no mask": forged(0, 8, FEW, bytes(20)),
    "grid": forged(7, 0, FEW, bytes(20)),
    "flags": forged(0, 64, FEW, bytes(20)),
    "a drawn mask that is none": forged(0, 32, FEW, bytes(20)),
    "density of a mask": forged(0, 2 | 32, FEW, struct.pack("<Qd", 0, np.nan) + bytes(20)),
    "more than all": forged(0, 2 | 32, FEW, struct.pack("<Qd", 0, 1.5) + bytes(20)),
    "drawn and coded": forged(0, 2 | 8 | 32, FEW, struct.pack("<Qd", 0, 0.5) + bytes(20)),
    "schema": resealed(GOLDEN["zero-dense"][0][:17] + b"\xff\xff\xff\xff" + GOLDEN["zero-dense"][0][21:]),
}
HARMLESS = {
    "half coded",
    "half",
    "rotation of nothing",
    "widest levels",
    "steep",
    "block of all",
}  # strange but legal


@pytest.mark.parametrize("name", BOMBS)
def test_a_false_claim_allocates_little_and_is_refused(name):
    like = {"w": np.zeros(0, np.float32)} if name == "rotation of nothing" else FEW
    with contextlib.suppress(CodecError):
        decode(BOMBS[name], like=like)  # what is imported on first use does not count
    assert allocated(lambda: decode(BOMBS[name], like=like)) <= limit(like)
    if name in HARMLESS:
        assert all(np.isfinite(array).all() for array in decode(BOMBS[name], like=like).values())
    else:
        with pytest.raises(CodecError):
            decode(BOMBS[name], like=like)


SCHEMAS = {
    "much": '[["w",[4000000000,4000000000]]]',
    "nothing of much": '[["w",[0,18446744073709551616]]]',
    "nothing of very much": '[["w",[0,4294967296,4294967296,4294967296]]]',
    "many dimensions": f'[["w",{[1] * 60}]]',
    "negative": '[["w",[-1]]]',
    "deep": "[" * 200_000,
    "long": "[" + "[]," * 300_000 + "[]]",
    "many": "[" + ",".join(f'["{i}",[]]' for i in range(60_000)) + "]",
    "text": '["ab","cd"]',
    "number": "1",
    "infinite": '[["w",[1e999]]]',
    "missing": '[["w",null]]',
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_false_schema_allocates_little_and_is_refused(name):
    schema = zlib.compress(SCHEMAS[name].encode())
    frame = bytearray(encode_snapshot({"w": np.zeros(3, np.float32)}))
    frame = bytes(frame[:25]) + schema + bytes(12)
    data = resealed(frame[:17] + len(schema).to_bytes(4, "little") + frame[21:])
    assert allocated(lambda: decode_snapshot(data)) <= 1_000_000
    with pytest.raises(CodecError):
        decode_snapshot(data)


def test_names_and_shapes_that_a_receiver_would_refuse_are_not_sent():
    with pytest.raises(CodecError, match="schema"):
        encode_snapshot({f"{i}": np.zeros(0, np.float32) for i in range(5000)})
