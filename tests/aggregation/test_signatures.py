"""Laws of signatures: distances are right, factors that mean the same are the same, memory stays small."""

import numpy as np
import pytest

from fedkit.aggregation import signatures
from fedkit.aggregation.signatures import SIDE, WIDTH, Signatures, sketch
from fedkit.arrays import flatten
from fedkit.errors import ConfigError

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def lora(r=2, seed=0, out=50, into=40):
    rng = np.random.default_rng(seed)
    return {
        A: rng.standard_normal((r, into), np.float32),
        B: rng.standard_normal((out, r), np.float32),
        "head": rng.standard_normal((2, 5), np.float32),
    }


def rows(kind, *adapters):
    found = Signatures(kind)
    for adapter in adapters:
        found.add(adapter)
    return found.rows()


def test_factors_are_the_flat_adapter():
    adapter = lora()
    np.testing.assert_array_equal(rows("factors", adapter)[0], flatten(adapter))


@pytest.mark.parametrize("change", ["rotated", "scaled", "sign"])
def test_products_do_not_depend_on_which_factors_make_them(change):
    adapter = lora()
    q = {
        "rotated": np.array([[0.6, -0.8], [0.8, 0.6]], np.float32),
        "scaled": np.diag([4.0, 0.5]).astype(np.float32),
        "sign": -np.eye(2, dtype=np.float32),
    }[change]
    same = {**adapter, A: np.linalg.inv(q).astype(np.float32) @ adapter[A], B: adapter[B] @ q}
    one, other = rows("product", adapter, same)
    np.testing.assert_allclose(one, other, atol=1e-4)
    assert np.linalg.norm(np.subtract(*rows("factors", adapter, same))) > 1


def test_products_of_mixed_ranks_compare():
    small = lora(r=2)
    large = {A: np.vstack([small[A], np.ones((3, 40), np.float32)]), "head": small["head"]}
    large = {A: large[A], B: np.hstack([small[B], np.zeros((50, 3), np.float32)]), "head": small["head"]}
    one, other = rows("product", small, large)
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_small_layers_are_compared_exactly():
    one, other = lora(out=SIDE, into=8), lora(out=SIDE, into=8, seed=1)
    first, second = rows("product", one, other)
    exact = np.square(one[B] @ one[A] - other[B] @ other[A]).sum() + np.square(one["head"] - other["head"]).sum()
    assert np.square(first - second).sum() == pytest.approx(exact, rel=1e-5)


def test_squared_distances_of_sketches_are_right_in_the_mean():
    rng = np.random.default_rng(0)
    ratios = []
    for _ in range(200):
        apart = rng.standard_normal(3000).astype(np.float32)
        ratios.append(np.square(sketch(apart)).sum() / np.square(apart).sum())
    assert np.mean(ratios) == pytest.approx(1, abs=0.03)
    assert np.var(ratios) <= 1.5 * 2 / WIDTH
    np.testing.assert_allclose(sketch(2 * apart), 2 * sketch(apart), rtol=1e-6)


def test_squared_distances_of_seen_products_are_right_in_the_mean():
    """Over layers, of which each has the same L and R: the views of 40 random products."""
    ratios = []
    for seed in range(40):
        adapter = {name: array for name, array in lora(seed=seed, out=60, into=70).items() if name != "head"}
        ratios.append(np.square(rows("product", adapter)).sum() / np.square(adapter[B] @ adapter[A]).sum())
    assert np.mean(ratios) == pytest.approx(1, abs=0.15)


def test_rows_are_exact_until_there_are_many(monkeypatch):
    monkeypatch.setattr(signatures, "EXACT", 3000)
    adapters = [{"w": np.random.default_rng(i).standard_normal(1000).astype(np.float32)} for i in range(5)]
    assert rows("factors", *adapters[:3]).shape == (3, 1000)
    found = rows("factors", *adapters)
    assert found.shape == (5, WIDTH)
    np.testing.assert_allclose(found[0], sketch(adapters[0]["w"]), rtol=1e-6)


def test_unknown_kinds_are_refused():
    with pytest.raises(ConfigError, match="signature: expected one of factors, product, got 'delta'"):
        Signatures("delta")
