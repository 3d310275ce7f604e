"""TAC over clients that hold parts of an adapter: LoRA of lower ranks, on both sides of the wire."""

import numpy as np
import pytest

from fedkit.aggregation.identities import cluster_accuracy
from fedkit.aggregation.slots import split_clusters, split_slots
from fedkit.arrays import flatten, flatten_mask, schema_digest
from fedkit.clients import AquilaMod, TacMod
from fedkit.codec.quantize import ZeroMidTread
from fedkit.faults import Faults
from fedkit.message import to_arrays
from fedkit.rounds import RoundGrid
from fedkit.skipping import SkipRule
from fedkit.strategies import Plain, Tac, Terms
from fedkit.submodels import lora_rank, owned, take, whole
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, client_app, initial
from tests.strategies.test_tac import RATE, TASKS, by_task, client, everybody, flat, goals

RANKS = {"r1": lora_rank(1), "r2": lora_rank(2, lora_alpha=3, server_lora_alpha=4)}
ONE = dict.fromkeys(TASKS, (0,))
HELD = ["r2", "", "r2", "r1", "", "r2"]  # by client; LIKE has rank 4
CUTS = RANKS | {"": whole}


def part(arrays, name):
    return take(arrays, CUTS[name](LIKE))


def federation(held=HELD, tasks=TASKS, *, mods=None):
    """Clients that move their part of each slot towards their part of its target."""
    apps = [
        client([part(goals(int(i), task), name) for task in own], mods=mods)
        for (i, own), name in zip(tasks.items(), held, strict=True)
    ]
    return named(InProcessGrid(apps), held)


def named(grid, held):
    for context, name in zip(grid.contexts.values(), held, strict=True):
        context.node_config.update({"submodel": name} if name else {})
    return grid


def run(strategy, grid, rounds=8, faults=None):
    wrapped = RoundGrid(grid, faults=faults)
    result = strategy.start(wrapped, initial(), num_rounds=rounds)
    return to_arrays(result.arrays), wrapped


def test_each_entry_of_a_cluster_is_averaged_over_those_that_hold_it():
    strategy = Tac(num_clusters=3, submodels=RANKS, **everybody())
    params, _ = run(strategy, federation())
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    masks = {name: flatten_mask(owned(cut(LIKE), like=LIKE)) for name, cut in CUTS.items()}
    for task, found in enumerate(by_task(params, strategy)):
        holders = [(int(i), HELD[int(i)]) for i, own in TASKS.items() if task in own]
        theta, total = np.zeros(88), np.sum([masks[name] for _, name in holders], axis=0)
        for _ in range(8):
            step = sum(masks[name] * RATE * (flatten(goals(i, task)) - theta) for i, name in holders)
            theta += np.divide(step, total, out=np.zeros(88), where=total > 0)
        np.testing.assert_allclose(flat(found), theta, atol=1e-5)


@pytest.mark.parametrize("missing", ["drop", "safari"])
@pytest.mark.parametrize("lora", ["factors", "product-update"])
def test_one_cluster_and_one_slot_is_the_mean_of_the_same_parts(lora, missing):
    options = {"submodels": RANKS, "lora": lora, "missing": missing, **everybody()}
    faults = Faults(drop=0.3, seed=2, start_round=3)
    ours, grid = run(Tac(num_clusters=1, **options), federation(tasks=ONE), faults=faults)
    parts = [part(goals(int(i), 0), name) for i, name in zip(ONE, HELD, strict=True)]
    plain = named(InProcessGrid([client_app([AquilaMod()], each, num_examples=10) for each in parts]), HELD)
    theirs, _ = run(Plain(weighted=False, downlink=None, **options), plain, faults=faults)
    np.testing.assert_allclose(flat(split_clusters(ours)[0]), flat(theirs), atol=1e-4)
    assert sum(grid.ledger.round_totals(k)["missing"] for k in range(1, 9)) > 0


def test_components_that_a_client_does_not_hold_count_as_those_of_its_cluster():
    """So that the mean of products, too, does not shrink them: `Plain` has "product-update" for that."""
    params = [
        run(Tac(num_clusters=1, submodels=RANKS, lora=lora, **everybody()), federation(tasks=ONE))[0]
        for lora in ("product", "product-update")
    ]
    np.testing.assert_allclose(flat(params[0]), flat(params[1]), atol=1e-4)


def test_if_all_hold_the_whole_nothing_changes():
    ours, _ = run(Tac(num_clusters=3, submodels={"all": whole}, **everybody()), federation([""] * 6))
    plain, _ = run(Tac(num_clusters=3, **everybody()), federation([""] * 6))
    assert all(ours[name].tobytes() == plain[name].tobytes() for name in plain)


def test_each_node_is_sent_its_own_rank_of_every_slot():
    received = {}

    def spy(message, context, call_next):
        slots = split_slots(to_arrays(message.content["arrays"]), 1)
        received.setdefault(context.node_config.get("submodel", ""), []).extend(slots)
        return call_next(message, context)

    run(Tac(num_clusters=3, submodels=RANKS, **everybody()), federation(mods=[TacMod(), spy]), 2)
    assert received.keys() == set(CUTS)
    for name, slots in received.items():
        assert all(schema_digest(arrays) == schema_digest(part(LIKE, name)) for arrays in slots)


@pytest.mark.parametrize(
    "options",
    [
        {"signature": "product", "quantizer": ZeroMidTread()},
        {"evidence": "updates"},
        {"missing": "safari"},
        {"missing": "mifa"},
        {"quantizer": ZeroMidTread(6, 6), "skip": SkipRule.aquila(0.05)},
        {"lora": "product-update"},
    ],
)
def test_every_coding_finds_the_tasks_over_ranks_and_losses(options):
    strategy = Tac(num_clusters=3, submodels=RANKS, **options, **everybody())
    params, grid = run(strategy, federation(), 25, Faults(drop=0.3, seed=1, start_round=2))
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0
    assert np.isfinite(flat(params)).all()
    assert sum(grid.ledger.round_totals(k)["rejected"] for k in range(1, 26)) == 0


def test_adapters_that_are_decoded_again_are_the_same(monkeypatch):
    wanted, _ = run(Tac(num_clusters=3, submodels=RANKS, **everybody()), federation())
    monkeypatch.setattr("fedkit.aggregation.arrivals.KEPT", 0)
    again, _ = run(Tac(num_clusters=3, submodels=RANKS, **everybody()), federation())
    assert all(again[name].tobytes() == wanted[name].tobytes() for name in wanted)


def test_terms_of_whole_adapters_go_with_a_density():
    terms = {"r1": Terms(quantizer=ZeroMidTread(2, 2)), "r2": Terms()}
    strategy = Tac(num_clusters=3, density=0.5, submodels=terms, **everybody())
    run(strategy, named(federation([""] * 6), HELD), 12)
    assert cluster_accuracy(strategy.state.assignment, TASKS) == 1.0


def test_a_run_is_resumed(tmp_path):
    def make():
        return Tac(num_clusters=3, submodels=RANKS, checkpoint=tmp_path, **everybody())

    wanted, _ = run(Tac(num_clusters=3, submodels=RANKS, **everybody()), federation())
    grid = federation()
    run(make(), grid, 4)
    found, _ = run(make(), grid, 8)
    np.testing.assert_allclose(flat(found), flat(wanted), atol=1e-6)
