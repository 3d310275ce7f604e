"""Laws of the shares that experiments give their clients."""

import numpy as np
import pytest

from fedkit.clients.partition import partition
from fedkit.errors import ConfigError

LABELS = np.random.default_rng(0).integers(0, 10, 1257)


@pytest.mark.parametrize("seed", range(5))
def test_parts_are_disjoint_and_cover_everything(seed):
    parts = partition(LABELS, num_clients=10, alpha=0.5, seed=seed, at_least=20)
    assert len(parts) == 10
    assert sorted(np.concatenate(parts)) == list(range(len(LABELS)))
    assert min(map(len, parts)) >= 20


def test_parts_depend_on_the_seed_alone():
    first, again, other = (partition(LABELS, num_clients=10, alpha=0.5, seed=seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other, strict=True))


def test_smaller_alpha_skews_labels_more():
    def largest_share(alpha):
        parts = partition(LABELS, num_clients=10, alpha=alpha, seed=0)
        return np.mean([np.bincount(LABELS[part]).max() / len(part) for part in parts])

    assert largest_share(0.5) > 0.25 > largest_share(100.0)


def test_a_split_that_cannot_exist_is_refused():
    with pytest.raises(ConfigError, match="dirichlet-alpha"):
        partition(LABELS, num_clients=200, alpha=0.5, seed=0)
