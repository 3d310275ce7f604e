"""TAC with other schemes' codings inside its clusters: lazy sums, masks, surrogates; what does not go together."""

import json

import numpy as np
import pytest

from fedkit.aggregation.identities import cluster_accuracy
from fedkit.aggregation.missing import Missing
from fedkit.clients import TacMod
from fedkit.codec.quantize import ZeroMidTread
from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.skipping import SkipRule
from fedkit.strategies import Aquila, Safari, Tac
from tests.helpers.quadratic import client_app, targets
from tests.strategies.test_tac import TASKS, by_task, client, clients, everybody, flat, goals, run

ALL_OF_IT = {"quantizer": ZeroMidTread(), "density": 0.5, "missing": "safari"}
LAZY = {"quantizer": ZeroMidTread(6, 6), "skip": SkipRule.aquila(0.05)}


def distance(params, strategy):
    """How far the clusters are from the mean goals of their tasks, relative to the goals."""
    found = by_task(params, strategy)
    true = [np.mean([flat(goals(int(n), t)) for n, ts in TASKS.items() if t in ts], axis=0) for t in range(3)]
    return max(np.linalg.norm(flat(a) - b) / np.linalg.norm(b) for a, b in zip(found, true, strict=True))


@pytest.mark.parametrize("options", [ALL_OF_IT, LAZY, {"missing": "mifa"}, {"missing": "reweight"}])
def test_every_coding_finds_the_tasks_and_learns_them(options):
    strategy = Tac(num_clusters=3, **options, **everybody())
    faults = Faults(drop=0.3, seed=1, start_round=2)
    params, grid = run(strategy, clients(), rounds=25, faults=faults)
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    assert distance(params, strategy) < 0.2
    assert grid.ledger.round_totals(25)["rejected"] == 0


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (
            LAZY,
            lambda: Aquila(beta=0.05, quantizer=ZeroMidTread(6, 6), weighted=False, downlink=None, **everybody(3)),
        ),
        (
            {"density": 0.5, "missing": "safari"},
            lambda: Safari(density=0.5, weighted=False, downlink=None, **everybody(3)),
        ),
    ],
)
def test_one_cluster_is_the_scheme_itself(ours, theirs):
    """One task, one slot: what Aquila or Safari does with the same clients, to the last digits."""
    from fedkit.clients import AquilaMod, SafariMod

    apps = [client_app([TacMod(), AquilaMod(), SafariMod()], target) for target in targets(3)]
    one, grid = run(Tac(num_clusters=1, screened=False, **ours, **everybody(3)), apps, rounds=8)
    other, twin = run(theirs(), apps, rounds=8)
    if "skip" in ours:
        np.testing.assert_allclose(flat(one), flat(other), atol=1e-5)
        skips = [[g.ledger.round_totals(k)["skips"] for k in range(1, 9)] for g in (grid, twin)]
        assert skips[0] == skips[1]
    else:  # masks are drawn by array, and the arrays have other names
        assert np.linalg.norm(flat(one) - flat(other)) < 0.3 * np.linalg.norm(flat(other))


def test_silent_clients_count_with_what_they_sent():
    strategy = Tac(num_clusters=3, skip=SkipRule.aquila(0.9), **everybody())
    params, grid = run(strategy, clients(), rounds=12)
    assert sum(grid.ledger.round_totals(k)["skips"] for k in range(1, 13)) > 0
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    assert np.isfinite(flat(params)).all()


def test_a_client_of_a_lazy_sum_that_changes_its_tasks_starts_anew():
    apps = clients()
    strategy = Tac(num_clusters=3, **LAZY, **everybody())

    class Growing:
        def __init__(self, inner):
            self.inner, self.rounds = inner, 0

        def __getattr__(self, name):
            return getattr(self.inner, name)

    from tests.helpers.grid import InProcessGrid

    grid = InProcessGrid(apps)

    def grow(server_round, arrays):
        if server_round == 3:
            grid.apps[1001] = client([goals(1, 2), goals(1, 0)])

    from fedkit.message import to_arrays

    result = strategy.start(grid, _initial(), num_rounds=20, evaluate_fn=grow)
    truth = {**TASKS, "1": (2, 0)}
    assert cluster_accuracy(strategy.state.assignment, truth) == 1.0
    assert np.isfinite(flat(to_arrays(result.arrays))).all()


def _initial():
    from tests.helpers.quadratic import initial

    return initial()


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
    ({"density": 0.5, "skip": SkipRule.aquila(0.1)}, "entries that rest"),
    ({"skip": SkipRule.laq()}, "a rule of one step"),
    ({"skip": SkipRule.aquila(0.1), "lora": "product"}, "next SVD"),
    ({"skip": SkipRule.aquila(0.1), "missing": "reweight"}, "silent on purpose"),
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
