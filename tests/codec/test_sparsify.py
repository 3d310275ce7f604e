import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedkit.codec.sparsify import density, gather, prune_and_regrow, random_mask, scatter
from fedkit.errors import SchemaMismatchError

LIKE = {"w": np.zeros((8, 10), np.float32), "bias": np.zeros(10, np.float32)}


def some(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=a.shape).astype(np.float32) for name, a in LIKE.items()}


@given(share=st.floats(0.01, 1.0), seed=st.integers(0, 99))
def test_scatter_undoes_gather_on_kept_entries(share, seed):
    arrays, mask = some(seed), random_mask(LIKE, share, np.random.default_rng(seed))
    back = scatter(gather(arrays, mask), mask, like=LIKE)
    assert all(np.array_equal(back[n], arrays[n] * mask[n]) for n in LIKE)


@given(share=st.floats(0.0001, 1.0))
def test_random_masks_have_the_density_and_keep_vectors_whole(share):
    mask = random_mask(LIKE, share, np.random.default_rng(0))
    assert mask["w"].sum() == max(1, round(share * 80))
    assert mask["bias"].all()


@given(share=st.floats(0.01, 1.0), rate=st.floats(0, 1), seed=st.integers(0, 99))
def test_prune_and_regrow_keeps_the_density_and_moves_the_share(share, rate, seed):
    mask = random_mask(LIKE, share, np.random.default_rng(seed))
    moved = prune_and_regrow(mask, some(seed), some(seed + 1), rate)
    assert density(moved) == density(mask)
    kept = int(mask["w"].sum())
    assert (mask["w"] & ~moved["w"]).sum() == min(int(rate * kept), 80 - kept)
    assert moved["bias"].all()


def test_the_least_go_and_the_largest_come():
    mask = {"w": np.array([[True, True, False, False]])}
    size = {"w": np.array([[1.0, 5.0, 0.0, 0.0]], np.float32)}
    growth = {"w": np.array([[9.0, 9.0, 2.0, -3.0]], np.float32)}
    assert prune_and_regrow(mask, size, growth, 0.5)["w"].tolist() == [[False, True, False, True]]


def test_a_mask_of_other_shapes_is_refused():
    with pytest.raises(SchemaMismatchError):
        gather(LIKE, {"w": np.ones((8, 10), np.bool_)})
