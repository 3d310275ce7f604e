"""Hostile bytes: ``python -m benchmarks.fuzz`` decodes mutated frames and counts the outcomes.

Golden and fresh frames are flipped, spliced, cut, extended, and given other header fields and forged sections;
most get a valid checksum and the expected digest, as a hostile sender would give them. Each must end in a
`CodecError` or in finite arrays of the right names and shapes. For a sample, the memory that decoding allocates is
traced: at most four times the arrays expected (or, for a snapshot, claimed) plus 1 MB. Anything else is printed,
and the exit status is 1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import tracemalloc
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fedkit.arrays import num_values, schema_digest
from fedkit.codec.baselines import Blocks, Qsgd, Sign
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.packing import unpack_mask
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.codec.rotation import Eden
from fedkit.codec.snapshot import decode_snapshot, encode_snapshot
from fedkit.codec.sparsify import DrawnMask, Magnitude, Structured, TopK, random_mask
from fedkit.codec.wire import HEADER_SIZE, Codec, decode
from fedkit.errors import CodecError

GOLDEN = Path(__file__).parents[1] / "tests" / "fixtures" / "wire" / "v1" / "frames.json"
QUANTIZERS = [
    None,
    AquilaMidTread(),
    ZeroMidTread(),
    ZeroMidTread(14, 16),
    Qsgd(6),
    Sign(),
    Blocks(4, 16),
    Blocks(12, 65535),
    Eden(2),
    *map(EntropyConstrained, (0.1, 0.8, 2.0, 8.0)),
]
SPARSIFIERS = [None, None, TopK(0.05), TopK(0.5), Magnitude(1.5), Structured(0.25)]
FULL = 1_000_000  # frames
POOL = 256  # fresh frames at a time
EXTREMES = (0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31, 2**32 - 1)
SLOW = 5.0  # seconds that no small frame may take


@dataclass(frozen=True)
class Seed:
    """A frame, and what its receiver knows."""

    frame: bytes
    known: Mapping[str, Any]  # keyword arguments of `decode`
    snapshot: bool = False


@dataclass
class Tally:
    """What came of the frames so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    traced: int = 0
    largest: float = 0.0  # allocated, as a share of what is allowed
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)


# ---- frames ------------------------------------------------------------------------------------


def golden() -> list[Seed]:
    """Return the golden frames."""
    seeds = []
    for name, case in json.loads(GOLDEN.read_text()).items():
        like = {key: np.zeros(shape, np.float32) for key, shape in case["shapes"].items()}
        last = case.get("last_mask") and {
            key: unpack_mask(bytes.fromhex(part), like[key].size).reshape(like[key].shape)
            for key, part in case["last_mask"].items()
        }
        known = {"like": like, "last_mask": last}
        seeds.append(Seed(bytes.fromhex(case["frame"]), known, name.startswith("snapshot")))
    return seeds


def fresh(rng: np.random.Generator, largest: int = 40) -> Seed:
    """Return a frame of random arrays, made by a random codec."""
    shapes = [tuple(rng.integers(0, largest, size=rng.integers(0, 3))) for _ in range(rng.integers(0, 6))]
    power = rng.choice([1, 1, 3, 7])
    update = {f"a{i}": (rng.normal(size=shape) ** power).astype(np.float32) for i, shape in enumerate(shapes)}
    codec = Codec(QUANTIZERS[rng.integers(len(QUANTIZERS))], SPARSIFIERS[rng.integers(len(SPARSIFIERS))])
    if rng.random() < 0.1:
        return Seed(encode_snapshot(update, Codec(codec.quantizer), rng=rng), {"like": update}, True)
    last = random_mask(update, 0.3, rng) if rng.random() < 0.3 else None
    mask = last if last is not None and rng.random() < 0.5 else None
    if rng.random() < 0.1:
        mask = DrawnMask(int(rng.integers(2**63)), float(rng.uniform(0.01, 1)))
    return Seed(codec.encode(update, mask=mask, last_mask=last, rng=rng), {"like": update, "last_mask": last})


# ---- mutations ---------------------------------------------------------------------------------


def flip(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Change a few bytes, near the front more often than not."""
    for _ in range(rng.integers(1, 5)):
        end = len(data) if rng.random() < 0.5 else min(len(data), HEADER_SIZE + 40)
        data[rng.integers(end)] ^= 1 << rng.integers(8) if rng.random() < 0.5 else rng.integers(1, 256)


def overwrite(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Write an extreme number over a few bytes."""
    width, start = int(rng.choice([1, 2, 4])), rng.integers(len(data))
    number = int(EXTREMES[rng.integers(len(EXTREMES))]) % 256**width
    data[start : start + width] = number.to_bytes(width, "little")


def header(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Change grid, flags, count or the size of the schema."""
    kind = rng.integers(4)
    if kind == 0:
        data[3:4] = bytes([rng.integers(9)])
    elif kind == 1:
        data[4:5] = bytes([rng.integers(72)])
    else:
        number = int(EXTREMES[rng.integers(len(EXTREMES))]) if rng.random() < 0.5 else int(rng.integers(2000))
        data[13 + 4 * (kind - 2) : 17 + 4 * (kind - 2)] = number.to_bytes(4, "little")


def cut(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Cut off the end, or a piece of the middle."""
    start = rng.integers(len(data))
    del data[start : start + (rng.integers(1, 9) if rng.random() < 0.5 else len(data))]


def extend(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Append bytes, or insert some."""
    more = rng.bytes(rng.integers(1, 65)) if rng.random() < 0.98 else bytes(200_000)
    at = len(data) if rng.random() < 0.5 else rng.integers(len(data) + 1)
    data[at:at] = more


def splice(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Go on with another frame from somewhere on."""
    data[rng.integers(len(data)) :] = other[rng.integers(len(other)) :]


def forge(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Replace what follows the header by a section made up: tables, bitmaps, words, or plain zeros."""
    front = data[HEADER_SIZE : HEADER_SIZE + rng.integers(0, 60)]
    table = bytes([rng.integers(4), rng.integers(8)]) + rng.bytes(rng.integers(1, 9))
    rest = [
        bytes([rng.integers(10) + 128 * rng.integers(2)]),
        rng.bytes(rng.integers(3)),
        table,
        rng.bytes(4 * rng.integers(40)),
    ]
    tail = b"".join(rest) if rng.random() < 0.6 else bytes(rng.integers(400))
    data[HEADER_SIZE:] = bytes(front) + tail


def claim(data: bytearray, rng: np.random.Generator, other: bytes) -> None:
    """Give the frame a schema section of its own."""
    texts = [
        json.dumps([["w", [int(rng.integers(2**20)), int(rng.integers(2**12))]]]),
        json.dumps([[str(i), []] for i in range(rng.integers(20_000))]),
        "[" * int(rng.integers(50_000)),
        "[" + "[]," * int(rng.integers(20_000)) + "[]]",
        "[]",
    ]
    schema = zlib.compress(texts[rng.integers(len(texts))].encode())
    data[17:21] = len(schema).to_bytes(4, "little")
    data[HEADER_SIZE:HEADER_SIZE] = schema


MUTATIONS: list[Callable[[bytearray, np.random.Generator, bytes], None]] = [
    *(flip, flip, overwrite, overwrite, header, header, cut, extend, splice, forge),
]


def mutate(seed: Seed, other: bytes, rng: np.random.Generator) -> bytes:
    """Return a mutant of a frame, mostly with the digest that is expected and a valid checksum."""
    data = bytearray(seed.frame)
    for _ in range(rng.integers(1, 4)):
        if seed.snapshot and rng.random() < 0.2:
            claim(data, rng, other)
        if data:
            MUTATIONS[rng.integers(len(MUTATIONS))](data, rng, other)
    if rng.random() < 0.95 and len(data) >= HEADER_SIZE:
        data[:3] = b"fk\x01"
        data[5:13] = schema_digest(seed.known["like"])
        data[21:25] = zlib.crc32(data[HEADER_SIZE:], zlib.crc32(data[:21])).to_bytes(4, "little")
    return bytes(data)


# ---- verdict -----------------------------------------------------------------------------------


def outcome(data: bytes, seed: Seed) -> str:
    """Return what comes of a frame; raises whatever decoding raises but should not."""
    like = seed.known["like"]
    try:
        decoded = decode_snapshot(data) if seed.snapshot else decode(data, **seed.known)
    except CodecError as error:
        return type(error).__name__
    if not seed.snapshot:
        assert list(decoded) == list(like), "other names"
        assert all(decoded[name].shape == np.shape(like[name]) for name in like), "other shapes"
    assert all(array.dtype == np.float32 for array in decoded.values()), "another dtype"
    assert all(np.isfinite(array).all() for array in decoded.values()), "NaN or infinite values"
    return "arrays"


def allowed(data: bytes, seed: Seed) -> int:
    """Return how many bytes decoding may allocate."""
    count = num_values(seed.known["like"])
    if seed.snapshot:
        try:
            size = int.from_bytes(data[17:21], "little")
            text = zlib.decompressobj().decompress(data[HEADER_SIZE : HEADER_SIZE + size], 2**20)
            claimed = sum(float(np.prod(shape, dtype=np.float64)) for _, shape in json.loads(text))
            count = int(min(claimed, 4096 * len(data)))
        except (ValueError, TypeError, RecursionError, zlib.error):
            count = 0
    return 16 * count + 10**6


def judge(data: bytes, seed: Seed, tally: Tally, *, traced: bool) -> None:
    """Decode a frame and write down what came of it."""
    limit = allowed(data, seed) if traced else 0
    start = time.perf_counter()
    try:
        if traced:
            tracemalloc.start()
        tally.outcomes[outcome(data, seed)] += 1
        if traced:
            share = tracemalloc.get_traced_memory()[1] / limit
            tally.traced, tally.largest = tally.traced + 1, max(tally.largest, share)
            assert share <= 1, f"allocates {share:.2f} times what it may"
    except BaseException as error:  # what Rust panics with is none of Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        tally.outcomes["FAILED"] += 1
        shapes = {name: np.shape(array) for name, array in seed.known["like"].items()}
        tally.failures.append(f"{type(error).__name__}: {error}\n  schema {shapes}\n  frame {data[:600].hex()}")
    finally:
        tracemalloc.stop()
    seconds = time.perf_counter() - start
    tally.slowest = tally.slowest if traced else max(tally.slowest, seconds)


def fuzz(seconds: float, frames: int, seed: int) -> Tally:
    """Return what came of frames, until so many seconds have passed and so many frames have been judged."""
    rng, tally, known, pool = np.random.default_rng(seed), Tally(), golden(), []
    end, count = time.monotonic() + seconds, 0
    while count < frames or time.monotonic() < end:
        if count % (64 * POOL) == 0:
            pool = [*known, *(fresh(rng) for _ in range(POOL)), *(fresh(rng, 400) for _ in range(4))]
        chosen, other = pool[rng.integers(len(pool))], pool[rng.integers(len(pool))]
        judge(mutate(chosen, other.frame, rng), chosen, tally, traced=count % 40 == 0)
        count += 1
        if len(tally.failures) >= 20:
            break
    return tally


def main(arguments: list[str] | None = None) -> int:
    """Run, print the counts, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fuzz", description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--full", action="store_true", help=f"{FULL:,} frames, however long they take")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    tally = fuzz(0, FULL, options.seed) if options.full else fuzz(options.seconds, 0, options.seed)
    for name, count in tally.outcomes.most_common():
        print(f"{count:>9,}  {name}")
    seconds = time.monotonic() - start
    print(f"{tally.outcomes.total():>9,}  frames in {seconds:.0f} s, the slowest {tally.slowest:.2f} s")
    print(f"{tally.traced:>9,}  traced: at most {tally.largest:.0%} of what they may allocate")
    for failure in tally.failures[:20]:
        print(failure, file=sys.stderr)
    return int(bool(tally.failures) or tally.slowest > SLOW)


if __name__ == "__main__":
    sys.exit(main())
