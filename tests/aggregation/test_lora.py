"""Means of products of LoRA factors, against matrices written out."""

import numpy as np
import pytest

from fedkit.aggregation.lora import LORA_GAP, Products, ProductSum, factors, lora_pairs
from fedkit.aggregation.mean import Mean
from fedkit.aggregation.product import ProductMean
from fedkit.aggregation.protocol import Cohort, Upload

A, B, HEAD = "x.lora_A.weight", "x.lora_B.weight", "head"


def random_arrays(seed, r=4, rows=10, columns=12):
    rng = np.random.default_rng(seed)
    shapes = {A: (r, columns), B: (rows, r), HEAD: (3,)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def product(arrays):
    return arrays[B].astype(np.float64) @ arrays[A].astype(np.float64)


def nearest(matrix, rank):
    u, sigma, vt = np.linalg.svd(matrix)
    return (u[:, :rank] * sigma[:rank]) @ vt[:rank]


def upload(number, arrays, weight):
    return Upload(number, str(number), weight, arrays, None, True, {}, 0, bytes(16))


def uploads_of(params, clients, weights):
    """The cohort and the uploads of clients that hold these arrays after training."""
    cohort = Cohort(1, dict.fromkeys(range(len(clients)), params))
    updates = [{name: client[name] - params[name] for name in params} for client in clients]
    return cohort, [upload(i, *pair) for i, pair in enumerate(zip(updates, weights, strict=True))]


def test_pairs_are_found_by_their_names():
    names = ["a.lora_A.weight", "head.weight", "a.lora_B.weight", "b.lora_A.weight", "lora_A", "lora_B"]
    found = lora_pairs(dict.fromkeys(names))
    assert [tuple(pair) for pair in found] == [("a.lora_A.weight", "a.lora_B.weight"), ("lora_A", "lora_B")]


@pytest.mark.parametrize("num", [1, 2, 7])  # a stack of factors, then one larger than the matrix
@pytest.mark.parametrize("size", [(10, 12), (40, 30)])
def test_a_sum_of_products_is_that_of_the_matrices(num, size):
    arrays = [random_arrays(seed, 4, *size) for seed in range(num)]
    total, dense = ProductSum(size), np.zeros(size)
    for weight, each in enumerate(arrays, 1):
        total.add(weight, each[B], each[A])
        dense += weight * product(each)
    assert total.norm() == pytest.approx(np.linalg.norm(dense), rel=1e-12)
    apart = np.linalg.norm(dense - product(arrays[0]))
    assert total.distance(arrays[0][B], arrays[0][A]) == pytest.approx(apart, rel=1e-9, abs=1e-9)
    u, sigma, vt = total.svd()
    np.testing.assert_allclose((u * sigma) @ vt, dense, atol=1e-10)


@pytest.mark.parametrize("num", [1, 3, 8])
def test_factors_are_the_nearest_of_their_rank(num):
    arrays = [random_arrays(seed) for seed in range(num)]
    total = ProductSum((10, 12))
    for each in arrays:
        total.add(1.0, each[B], each[A])
    b, a = factors(total, 4, arrays[0][A])
    np.testing.assert_allclose(b @ a, nearest(sum(map(product, arrays)), 4), atol=1e-5)
    shortest, sigma = np.linalg.norm(arrays[0][A], axis=1).min(), total.svd()[1][:4]
    np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.maximum(shortest, np.sqrt(sigma)), rtol=1e-5)
    np.testing.assert_allclose(a @ a.T, np.diag(np.diag(a @ a.T)), atol=1e-4)


def test_leading_components_come_first():
    total = ProductSum((10, 12))
    for seed in range(5):
        total.add(1.0, random_arrays(seed)[B], random_arrays(seed)[A])
    b, a = factors(total, 8, random_arrays(0, 8)[A])
    for r in (1, 3, 8):
        np.testing.assert_allclose(b[:, :r] @ a[:r], nearest(total._dense, r), atol=1e-5)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_product_of_lower_rank_leaves_factors_that_can_be_trained(rank):
    arrays = random_arrays(0)
    arrays[B][:, rank:] = 0
    total = ProductSum((10, 12))
    total.add(1.0, arrays[B], arrays[A])
    b, a = factors(total, 4, arrays[A])
    np.testing.assert_allclose(b @ a, product(arrays), atol=1e-5)
    assert not b[:, rank:].any()
    assert np.linalg.norm(a, axis=1).min() > 1
    assert np.linalg.matrix_rank(a) == 4


def test_more_rows_than_columns_are_filled_too():
    total = ProductSum((10, 3))
    b, a = factors(total, 8, np.ones((8, 3), np.float32))
    assert a.shape == (8, 3)
    assert np.linalg.norm(a, axis=1).min() > 1
    assert not b.any()


def test_a_gap_is_that_of_the_matrices():
    clients, params = [random_arrays(seed) for seed in range(3)], random_arrays(9)
    cohort, uploads = uploads_of(params, clients, [1.0, 2.0, 5.0])
    new, _, metrics, _ = Mean(gap=True)(params, cohort, uploads, None)
    true = sum(w * product(c) for w, c in zip((1, 2, 5), clients, strict=True)) / 8
    expected = np.linalg.norm(true - product(new)) / np.linalg.norm(true)
    assert metrics[LORA_GAP] == pytest.approx(expected, rel=1e-5)
    assert expected > 0.1
    plain, _, none, _ = Mean()(params, cohort, uploads, None)
    assert none == {}
    assert all(plain[name].tobytes() == new[name].tobytes() for name in plain)


def test_no_products_have_no_gap():
    assert Products(random_arrays(0)).gap(random_arrays(0)) == 0
    assert Products({"w": np.zeros(3, np.float32)}).gap({"w": np.zeros(3, np.float32)}) == 0


def test_the_mean_of_products_is_exact_if_the_rank_suffices():
    clients = [random_arrays(seed, 16) for seed in range(3)]
    for client in clients:  # 3 clients × rank 4 in a server of rank 16, of which 10 × 12 has room for 10
        client[A][4:], client[B][:, 4:] = 0, 0
    params = random_arrays(9, 16)
    cohort, uploads = uploads_of(params, clients, [1.0, 2.0, 5.0])
    new, _, metrics, _ = ProductMean()(params, cohort, uploads, None)
    true = sum(w * product(c) for w, c in zip((1, 2, 5), clients, strict=True)) / 8
    np.testing.assert_allclose(product(new), true, atol=1e-5)
    assert metrics[LORA_GAP] < 1e-6
    mean = sum(w * c[HEAD] for w, c in zip((1, 2, 5), clients, strict=True)) / 8
    np.testing.assert_allclose(new[HEAD], mean, atol=1e-5)


def test_without_uploads_nothing_moves():
    params = random_arrays(0)
    new, _, metrics, _ = ProductMean()(params, Cohort(1, {}), [], None)
    assert all(new[name].tobytes() == params[name].tobytes() for name in params)
    assert metrics == {}
