"""TAC with other schemes' codings inside its clusters: lazy sums, masks, surrogates; what does not go together."""

import json

import numpy as np
import pytest

from fedkit.aggregation.arrivals import Seen
from fedkit.aggregation.cluster import Clustered
from fedkit.aggregation.identities import adjusted_rand_index, cluster_accuracy
from fedkit.aggregation.missing import Missing
from fedkit.aggregation.slots import split_slots
from fedkit.aggregation.tasks import Tasks
from fedkit.clients import AquilaMod, TacMod
from fedkit.codec.quantize import ZeroMidTread
from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.message import to_arrays
from fedkit.skipping import SkipRule
from fedkit.strategies import Aquila, Tac
from fedkit.strategies.cluster_map import ClusterMap
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import client_app, initial, targets
from tests.strategies.test_tac import TASKS, by_task, client, clients, everybody, flat, goals, run

ALL_OF_IT = {"quantizer": ZeroMidTread(), "density": 0.5, "missing": "safari"}
LAZY = {"quantizer": ZeroMidTread(6, 6), "skip": SkipRule.aquila(0.05)}
BY_UPDATES = {"evidence": "updates"}


def distance(params, strategy):
    """How far the clusters are from the mean goals of their tasks, relative to the goals."""
    found = by_task(params, strategy)
    true = [np.mean([flat(goals(int(n), t)) for n, ts in TASKS.items() if t in ts], axis=0) for t in range(3)]
    return max(np.linalg.norm(flat(a) - b) / np.linalg.norm(b) for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize(
    "options",
    [ALL_OF_IT, LAZY, {"missing": "mifa"}, {"missing": "reweight"}, ALL_OF_IT | BY_UPDATES, LAZY | BY_UPDATES],
)
def test_every_coding_finds_the_tasks_and_learns_them(options):
    strategy = Tac(num_clusters=3, **options, **everybody())
    faults = Faults(drop=0.3, seed=1, start_round=2)
    params, grid = run(strategy, clients(), rounds=25, faults=faults)
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    assert distance(params, strategy) < 0.2
    assert grid.ledger.round_totals(25)["rejected"] == 0


def test_one_cluster_with_a_skip_rule_is_aquila():
    """One task, one slot: the same arrays and the same silence."""
    apps = [client_app([TacMod(), AquilaMod()], target) for target in targets(3)]
    form = {"quantizer": ZeroMidTread(6, 6), "weighted": False, "downlink": None}
    one, grid = run(
        Tac(num_clusters=1, skip=SkipRule.aquila(0.9), quantizer=ZeroMidTread(6, 6), **everybody(3)),
        apps,
        rounds=8,
    )
    other, twin = run(Aquila(beta=0.9, **form, **everybody(3)), apps, rounds=8)
    np.testing.assert_allclose(flat(one), flat(other), atol=1e-5)
    skips = [[g.ledger.round_totals(k)["skips"] for k in range(1, 9)] for g in (grid, twin)]
    assert skips[0] == skips[1]
    assert sum(skips[0]) > 0


def test_all_adapters_travel_under_one_mask_and_another_in_each_round():
    masks = []

    class Watched(Clustered):
        def __call__(self, params, cohort, uploads, state):
            found = list(uploads)
            masks.append([part for upload in found for part in map(flat, split_slots(upload.mask, 9))])
            return super().__call__(params, cohort, found, state)

    strategy = Tac(num_clusters=3, density=0.3, **everybody())
    strategy.aggregator = Watched(strategy.aggregator.tasks, strategy.aggregator.inner)
    run(strategy, clients(), rounds=2)
    for of_round in masks:
        assert all(np.array_equal(mask, of_round[0]) for mask in of_round)
    assert not np.array_equal(masks[0][0], masks[1][0])


def test_adapters_under_masks_of_their_own_are_hard_to_tell_apart():
    """Why there is one mask: 32 adapters, noise twice as large as what a task's have in common, a fifth sent."""
    rng, tasks = np.random.default_rng(0), np.repeat(range(4), 8)
    updates = rng.normal(size=(4, 4000))[tasks] + 2 * rng.normal(size=(32, 4000))
    names, start = [str(i) for i in range(32)], np.zeros((4, 4000))

    def ari(kept):
        return adjusted_rand_index({"": Tasks(4).label(names, updates * kept, start)}, {"": tasks.tolist()})

    assert ari(np.tile(rng.random(4000) < 0.2, (32, 1))) == 1.0
    assert ari(rng.random((32, 4000)) < 0.2) < 0.9


def test_silent_clients_count_with_what_they_sent():
    strategy = Tac(num_clusters=3, skip=SkipRule.aquila(0.9), **everybody())
    params, grid = run(strategy, clients(), rounds=12)
    assert sum(grid.ledger.round_totals(k)["skips"] for k in range(1, 13)) > 0
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    assert np.isfinite(flat(params)).all()


def test_a_client_of_a_lazy_sum_that_changes_its_tasks_starts_anew():
    strategy, grid = Tac(num_clusters=3, **LAZY, **everybody()), InProcessGrid(clients())

    def grow(server_round, arrays):
        if server_round == 3:
            grid.apps[1001] = client([goals(1, 2), goals(1, 0)])

    result = strategy.start(grid, initial(), num_rounds=12, evaluate_fn=grow)
    truth = {**TASKS, "1": (2, 0)}
    assert cluster_accuracy(strategy.state.assignment, truth) == 1.0
    assert np.isfinite(flat(to_arrays(result.arrays))).all()


def test_masked_and_quantized_slots_are_much_smaller():
    def uplink(**options):
        _, grid = run(Tac(num_clusters=3, **options, **everybody()), clients(), rounds=4)
        entries = [e for k in range(1, 5) for e in grid.ledger.entries[k] if e.direction == "uplink"]
        return sum(entry.frame_bytes for entry in entries)

    assert uplink(**ALL_OF_IT) < 0.25 * uplink()


def test_who_stood_in_is_told_by_client(tmp_path):
    strategy = Tac(num_clusters=3, missing=Missing("safari", warmup_rounds=1), **everybody())
    _, grid = run(strategy, clients(), rounds=4, faults=Faults(rates={"5": 1.0}, start_round=4))
    (names,) = [grid.ledger._measured[4]["stand-ins"]]
    assert set(names) == {"5"}
    assert set(names["5"].split(", ")) <= set(TASKS)


REFUSED = [
    ({"density": 0.0}, "density must be above 0"),
    ({"density": 0.5, "lora": "product"}, "no product"),
    ({"density": 0.5, "skip": SkipRule.aquila(0.1)}, "inactive entries"),
    ({"skip": SkipRule.laq()}, "a rule of one step"),
    ({"skip": SkipRule.aquila(0.1), "lora": "product"}, "next SVD"),
    ({"skip": SkipRule.aquila(0.1), "missing": "reweight"}, "one that skips"),
    ({"lora": "product", "missing": "mifa"}, "next SVD"),
    ({"lora": "ffa"}, "ffa: not with Tac"),
    ({"number": "guess"}, "number: expected one of given, at-most"),
    ({"signature": "none"}, "signature: expected one of"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_what_does_not_go_together_is_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        Tac(num_clusters=2, **options)


def test_the_map_has_every_adapter_of_every_round(tmp_path):
    strategy = Tac(num_clusters=3, checkpoint=tmp_path, tasks=TASKS, **everybody())
    run(strategy, clients(), rounds=3)
    lines = [json.loads(line) for line in (tmp_path / "clusters.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [1, 2, 3]
    assert all(len(line["adapters"]) == 11 for line in lines)
    assert set(lines[-1]["adapters"][0]) == {"client", "slot", "cluster", "x", "y"}
    assert (lines[-1]["ari"], lines[-1]["purity"]) == (1.0, 1.0)
    found = {(a["client"], a["slot"]): a["cluster"] for a in lines[-1]["adapters"]}
    assert found == {(n, j): k for n, ks in strategy.state.assignment.items() for j, k in enumerate(ks)}
    middle = {k: [] for k in range(3)}
    for adapter in lines[-1]["adapters"]:
        middle[adapter["cluster"]].append((adapter["x"], adapter["y"]))
    means = {k: np.mean(places, axis=0) for k, places in middle.items()}
    spread = max(np.linalg.norm(np.subtract(p, means[k])) for k, places in middle.items() for p in places)
    apart = min(np.linalg.norm(means[i] - means[j]) for i in means for j in means if i != j)
    assert apart > 3 * spread, "clusters are apart on the map, too"


def test_an_adapter_that_was_set_aside_is_at_the_rim_of_the_map(tmp_path):
    points = np.random.default_rng(0).normal(size=(9, 20))
    points[8] = 1e17
    aside = np.arange(9) == 8
    ClusterMap(None).put(tmp_path, 1, Seen("abcdefghi", [0] * 9, points, [0, 1] * 4 + [0], aside))
    (line,) = [json.loads(line) for line in (tmp_path / "clusters.jsonl").read_text().splitlines()]
    out = [np.hypot(adapter["x"], adapter["y"]) for adapter in line["adapters"]]
    assert max(out[:8]) < out[8] <= 1.6 * max(out[:8])
    assert [adapter.get("aside", False) for adapter in line["adapters"]] == aside.tolist()
    assert "ari" not in line


@pytest.mark.parametrize("shape", [(1, 5), (2, 1), (600, 700)])
def test_any_number_of_adapters_is_put_on_the_map(shape, tmp_path):
    points = np.random.default_rng(0).normal(size=shape)
    seen = Seen(
        [str(i) for i in range(shape[0])], [0] * shape[0], points, [0] * shape[0], np.zeros(shape[0], bool)
    )
    ClusterMap({"0": (1, 2)}).put(tmp_path, 3, seen)
    (line,) = [json.loads(line) for line in (tmp_path / "clusters.jsonl").read_text().splitlines()]
    assert len(line["adapters"]) == shape[0]
    assert line["ari"] == line["purity"] == 1.0
