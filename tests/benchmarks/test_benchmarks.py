"""The smallest arm of every benchmark, and every peer there and back."""

import json

import numpy as np
import pytest

from benchmarks import aggregate, bounds, codec, innovations
from benchmarks.harness import NotInstalledError
from benchmarks.ours import OURS
from benchmarks.peers import PEERS
from benchmarks.peers.levels import gamma, ungamma
from fedkit.arrays import flatten, num_values

COUNT = 3000
KNOBS = [pytest.param(peer, knob, id=f"{peer.name}-{knob:.3g}") for peer in (*OURS, *PEERS) for knob in peer.knobs]


def recording(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"a": (40, 50), "b": (25, 40)}
    update = {name: rng.laplace(size=shape).astype(np.float32) for name, shape in shapes.items()}
    return innovations.Recording("toy_round1 0", update)


@pytest.mark.parametrize(("peer", "knob"), KNOBS)
def test_a_codec_there_and_back(peer, knob):
    toy = recording()
    vector = flatten(toy.update)
    coder = codec.coder_of(peer, knob, toy)
    try:
        data = coder.encode(vector)
    except NotInstalledError as missing:
        pytest.skip(str(missing))
    decoded = coder.decode(data, COUNT)
    assert isinstance(data, bytes)
    assert decoded.shape == (COUNT,)
    assert decoded.dtype == np.float32
    bits = 8 * len(data) / COUNT
    assert codec.error_of(vector, decoded) < (0.01 if bits > 8 and "top-k" not in peer.name else 300)


def test_gammas_are_read_back():
    numbers = np.array([1, 2, 3, 4, 1, 1, 1000, 7], np.int64)
    read, rest = ungamma(gamma(numbers) + b"rest", numbers.size)
    assert read.tolist() == numbers.tolist()
    assert rest == b"rest"


def test_the_bounds_of_normal_values_are_the_known_ones():
    update = {"a": np.random.default_rng(0).standard_normal(60_000, np.float32)}
    for rate in (0.5, 1, 2, 3):
        for curve in (bounds.gaussian(update), bounds.empirical(update)):
            assert bounds.at(rate, curve) == pytest.approx(4.0**-rate, rel=0.06)


def test_the_bound_of_signs_is_that_of_a_coin():
    update = {"a": np.sign(np.random.default_rng(0).standard_normal(20_000, np.float32))}
    assert bounds.at(1, bounds.empirical(update)) < 0.01  # a bit says all
    assert 0.2 < bounds.at(0.5, bounds.empirical(update)) < 0.5  # a Gaussian's is 0.5


def test_our_codec_is_between_the_bound_and_one():
    toy = recording()
    curve = bounds.empirical(toy.update)
    for peer in OURS:
        for knob in peer.knobs:
            row = codec.measure(peer, knob, [toy])
            assert row["bits"] > 5 or row["error"] > 0.9 * bounds.at(row["bits"], curve), peer.name


def test_interpolation_leaves_out_knobs_that_no_one_would_set():
    rows = [{"bits": b, "error": e} for b, e in ((1, 0.4), (2, 0.1), (1.5, 0.9))]
    assert codec.interpolate(rows, 1.5) == pytest.approx(0.2)
    assert codec.interpolate(rows, 0.5) is None
    assert codec.interpolate(rows, 5) == pytest.approx(0.1)


def test_clients_are_stacked(tmp_path):
    for client in range(5):
        np.savez(tmp_path / f"toy_round3_client{client}.npz", **recording(client).update)
    first, second = innovations.load(tmp_path, least=2 * COUNT)
    assert (first.name, second.name) == ("toy_round3 0", "toy_round3 1")
    assert num_values(first.update) == 2 * COUNT
    assert list(first.update)[:2] == ["client-0/a", "client-0/b"]


@pytest.mark.slow
def test_the_codec_benchmark_from_end_to_end(tmp_path, monkeypatch):
    """With every peer that is installed, and the picture."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(innovations, "LEAST", COUNT)
    np.savez(tmp_path / "toy_round3_client0.npz", **recording().update)
    monkeypatch.setattr(innovations.load, "__kwdefaults__", {"most": None, "least": COUNT})
    options = ["--out", str(tmp_path), "--innovations", str(tmp_path), "--json", str(tmp_path / "rows.json")]
    codec.main([*options, "--count", "5000", "--plot", str(tmp_path / "codec.png")])
    assert (tmp_path / "codec.png").stat().st_size > 10_000
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {"fedkit", "top-k, float32 + int32", "bounds", "ours, EDEN, pcodec on Laplace"} <= {
        row["arm"] for row in rows
    }


@pytest.mark.slow
def test_the_aggregate_benchmark_from_end_to_end(tmp_path):
    aggregate.main(["--out", str(tmp_path), "--clients", "2", "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert {arm["arm"] for arm in row["arms"]} > {aggregate.SUM, aggregate.FEDAVG}
    assert all(arm["seconds"] > 0 for arm in row["arms"])


def test_the_quickstart_is_recorded(tmp_path):
    innovations.record(innovations.Source("quickstart", "quickstart", (1,), {"num-clients": 3}), tmp_path)
    (stack,) = innovations.load(tmp_path)
    assert num_values(stack.update) == 3 * 25_546
