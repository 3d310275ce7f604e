"""Error against real bytes, speed and memory of our codecs and of their peers.

``python -m benchmarks.codec [--full] [--plot FILE]``. Errors are ``‖x − x̂‖² / ‖x‖²``, bits are 8 · bytes /
values; both are means over recordings of `benchmarks.innovations` (recorded first if there are none). The bounds
are those of `benchmarks.bounds`. Speed is measured on Laplace values whose scale changes every 256, on one thread,
beside a copy of the array.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import bounds, innovations
from benchmarks.harness import MISSING, Bench, Row, parser, sources_digest
from benchmarks.machine import peak_rise, side_by_side
from benchmarks.ours import MAIN, OURS, Fedkit
from benchmarks.peers import PEERS, Coder, Peer
from benchmarks.peers.base import Vector
from benchmarks.peers.floats import decode_levels, encode_levels
from benchmarks.peers.rotation import Eden
from fedkit.arrays import flatten

RATES = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 4.0)
CURVE = {"codec": "codec", "knob": "knob", "bits": "bits per value", "over": "÷ entropy", "error": "error"}
SPEED = {
    "codec": "codec",
    "bits": "bits",
    "encode": "encode, s",
    "decode": "decode, s",
    "encode-copies": "copies",
    "decode-copies": "copies",
    "encode-memory": "peak / input",
    "decode-memory": "peak / input",
}


def coder_of(peer: Peer, knob: float, recording: innovations.Recording | None = None) -> Coder:
    """Return a codec with its knob set; ours is told the names and shapes of the recording."""
    coder = peer.make(knob)
    return replace(coder, like=recording.update) if isinstance(coder, Fedkit) and recording else coder


def measure(peer: Peer, knob: float, recordings: Sequence[innovations.Recording]) -> Row:
    """Return the mean bits per value, for ours also over the entropy of levels and mask, and the mean error."""
    bits, errors, over = [], [], []
    for recording in recordings:
        vector, coder = flatten(recording.update), coder_of(peer, knob, recording)
        data = coder.encode(vector)
        bits.append(8 * len(data) / vector.size)
        errors.append(error_of(vector, coder.decode(data, vector.size)))
        if isinstance(coder, Fedkit):
            over.append(8 * len(data) / coder.ideal_bits(data, vector.size))
    row: Row = {"bits": float(np.mean(bits)), "error": float(np.mean(errors))}
    return {**row, "over": float(np.mean(over))} if over else row


def error_of(vector: Vector, decoded: Vector) -> float:
    """Return ``‖x − x̂‖² / ‖x‖²``."""
    lost = np.square(vector.astype(np.float64) - decoded).sum()
    return float(lost / np.square(vector, dtype=np.float64).sum())


def curves(bench: Bench, app: str, recordings: Sequence[innovations.Recording]) -> list[Row]:
    """Return a row for each codec and knob, on the recordings of one app."""
    code = sources_digest("fedkit/codec")
    data = hashlib.blake2b(b"".join(flatten(r.update).tobytes() for r in recordings), digest_size=4).hexdigest()
    rows: list[Row] = []
    for peer in (*OURS, *PEERS):
        ours = {"code": code} if peer in OURS else {}
        for knob in peer.knobs:
            params = {"codec": peer.name, "knob": knob, "app": app, "data": data, **ours}
            rows.append(bench.arm(peer.name, partial(measure, peer, knob, recordings), **params))
            if MISSING in rows[-1]:
                break
    return rows


def bound(bench: Bench, app: str, recordings: Sequence[innovations.Recording]) -> Row:
    """Return both bounds at many rates, as geometric means over the first recording of each round."""
    firsts = {recording.name.rpartition(" ")[0]: recording for recording in reversed(recordings)}

    def compute() -> Row:
        rates = np.concatenate([np.linspace(0.05, 1, 20), np.linspace(1.1, 8, 70)])
        found = {"rates": rates.tolist()}
        for name, function in {"gaussian": bounds.gaussian, "empirical": bounds.empirical}.items():
            errors = [[bounds.at(rate, curve) for rate in rates] for curve in map(function, _updates(firsts))]
            found[name] = np.exp(np.log(errors).mean(axis=0)).tolist()
        return found

    return bench.arm("bounds", compute, app=app, recordings=sorted(firsts), bins=bounds.BINS)


def _updates(recordings: dict[str, innovations.Recording]) -> list[Any]:
    return [recording.update for recording in recordings.values()]


def verdict(rows: Sequence[Row], bound_row: Row) -> list[Row]:
    """Return, rate by rate, our error, the best peer's at the same real bytes, and the bounds'."""
    found = []
    for rate in RATES:
        ours = interpolate([row for row in rows if row["codec"] == MAIN], rate)
        peers = {p.name: interpolate([row for row in rows if row["codec"] == p.name], rate) for p in PEERS}
        its, best = min(
            ((error, name) for name, error in peers.items() if error is not None), default=(None, None)
        )
        row: Row = {"rate": rate, "ours": ours, "best peer": best, "its": its}
        row["ratio"] = its / ours if its and ours else None
        for name in ("gaussian", "empirical"):
            row[name] = bounds.at(rate, (np.array(bound_row["rates"]), np.array(bound_row[name])))
        found.append(row)
    return found


def interpolate(rows: Sequence[Row], rate: float) -> float | None:
    """Return the error of a codec at a rate, log-linear between knobs; None if it cannot take so few bits.

    Knobs that take more bits for no smaller an error are left out: one would not set them.
    """
    best: list[tuple[float, float]] = []
    for row in sorted((row for row in rows if MISSING not in row), key=lambda row: (row["bits"], row["error"])):
        if not best or row["error"] < best[-1][1]:
            best.append((row["bits"], row["error"]))
    if not best or rate < 0.95 * best[0][0]:  # an asked rate is met within 5 %
        return None
    bits, errors = np.array(best).T
    return float(np.exp(np.interp(rate, bits, np.log(np.maximum(errors, 1e-12)))))


def laplace(count: int, seed: int = 0) -> Vector:
    """Return Laplace values whose scale changes every 256 values."""
    rng = np.random.default_rng(seed)
    scales = np.exp(rng.normal(size=-(-count // 256))).astype(np.float32)
    return (rng.laplace(size=count).astype(np.float32) * np.repeat(scales, 256)[:count]) / np.float32(100)


def speed(peer: Peer, vector: Vector, repeats: int) -> Row:
    """Return the median seconds to encode and decode beside those of a copy, and the rise of peak memory."""
    coder = peer.make(peer.at_one_bit)  # type: ignore[arg-type]  # the caller left out those without
    data = coder.encode(vector)
    arms: dict[str, Callable[[], object]] = {
        "encode": partial(coder.encode, vector),
        "decode": partial(coder.decode, data, vector.size),
        "copy": vector.copy,
    }
    error = error_of(vector, coder.decode(data, vector.size))
    row: Row = {"bits": 8 * len(data) / vector.size, "error": error}
    seconds = side_by_side(arms, repeats=repeats)
    for name in ("encode", "decode"):
        row[name], row[f"{name}-copies"] = seconds[name], seconds[name] / seconds["copy"]
        row[f"{name}-memory"] = peak_rise(arms[name]) / vector.nbytes
    return row


def duel(vector: Vector, repeats: int) -> Row:
    """Return seconds, in one run: ours at 1 bit, EDEN at 1 bit, and pcodec on the levels of ours.

    Ours and EDEN go from values to bytes and back. pcodec starts from levels; going back, the levels are looked
    up, since values are what is wanted.
    """
    ours = next(peer for peer in OURS if peer.name == MAIN)
    coders: dict[str, Coder] = {"ours": ours.make(ours.at_one_bit or 1.0)}
    coders |= {"eden": Eden(1, unbiased=True), "eden-padded": Eden(1, unbiased=True, padded=True)}
    frames = {name: coder.encode(vector) for name, coder in coders.items()}
    values = coders["ours"].decode(frames["ours"], vector.size)
    known, inverse = np.unique(values, return_inverse=True)
    levels = inverse.astype(np.int16)
    packed = encode_levels(levels)
    arms: dict[str, Callable[[], object]] = {
        "pcodec-encode": partial(encode_levels, levels),
        "pcodec-decode": lambda: np.take(known, decode_levels(packed), mode="clip"),
        "pcodec-levels-decode": partial(decode_levels, packed),
    }
    for name, coder in coders.items():
        arms[f"{name}-encode"] = partial(coder.encode, vector)
        arms[f"{name}-decode"] = partial(coder.decode, frames[name], vector.size)
    row: Row = dict(side_by_side(arms, repeats=repeats))
    for name, size in {**{n: len(f) for n, f in frames.items()}, "pcodec": len(packed)}.items():
        row[f"{name}-bits"] = 8 * size / vector.size
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, plot."""
    arguments = parser(__doc__)
    arguments.add_argument("--plot", metavar="FILE", help="draw the curves, as PNG or SVG")
    arguments.add_argument(
        "--innovations", metavar="DIR", help="where recordings are, if not in the folder of rows"
    )
    arguments.add_argument("--count", type=int, help="how many values speed is measured on")
    options = arguments.parse_args(argv)
    bench = Bench("codec", options)
    figures: dict[str, Any] = {}
    values = np.zeros(1, np.float32)
    for app, recordings in recorded(options).items():
        values = flatten(recordings[-1].update)
        rows, bound_row = curves(bench, app, recordings), bound(bench, app, recordings)
        figures[app] = rows, bound_row
        bench.table(f"{app}: {len(recordings)} recordings", CURVE, rows)
        _print_verdict(bench, app, verdict(rows, bound_row))
    measure_speed(bench, options.count or (10_000_000 if bench.full else 1_000_000), values)
    bench.finish()
    if options.plot:
        from benchmarks.plot import plot

        plot(figures, Path(options.plot))


def recorded(options: Any) -> dict[str, list[innovations.Recording]]:
    """Return the recordings by app; they are made if there are none."""
    folder = Path(options.innovations or Path(options.out, "innovations"))
    if not options.innovations:
        for source in innovations.sources(options.full):
            innovations.record(source, folder)
    apps: dict[str, list[innovations.Recording]] = {}
    for recording in innovations.load(folder, most=None if options.full else 1):
        apps.setdefault(recording.name.partition("_round")[0], []).append(recording)
    return apps


def measure_speed(bench: Bench, count: int, recorded_values: Vector) -> None:
    """Add the rows of speed and memory."""
    vector, repeats = laplace(count), 5 if bench.full else 3
    code = sources_digest("fedkit/codec")
    rows = []
    for peer in (*OURS, *PEERS):
        if peer.at_one_bit is not None:
            ours = {"code": code} if peer in OURS else {}
            params = {"codec": peer.name, "knob": peer.at_one_bit, "count": count, "speed": True, **ours}
            rows.append(bench.arm(peer.name, partial(speed, peer, vector, repeats), **params))
    bench.table(f"{count:,} values, one thread", SPEED, rows)
    for data, values in {
        "recorded values, repeated": np.resize(recorded_values, count),
        "Laplace": vector,
    }.items():
        name = f"ours, EDEN, pcodec on {data}"
        row = bench.arm(name, partial(duel, values, repeats), count=count, code=code)
        contestants = [
            {"arm": n, "codec": n, **{k: row.get(f"{n}-{k}") for k in ("bits", "encode", "decode")}}
            for n in ("ours", "eden", "eden-padded", "pcodec", "pcodec-levels")
        ]
        shown = contestants if MISSING not in row else [row]
        bench.table(data, {key: SPEED[key] for key in ("codec", "bits", "encode", "decode")}, shown)


def _print_verdict(bench: Bench, app: str, rows: Sequence[Row]) -> None:
    columns = {"rate": "bits", "ours": MAIN, "best peer": "best peer", "its": "its error", "ratio": "peer / ours"}
    columns |= {"gaussian": "Gaussian bound", "empirical": "empirical bound"}
    bench.table(f"{app}: at the same real bytes", columns, [{"arm": "", **row} for row in rows])


if __name__ == "__main__":
    main()
