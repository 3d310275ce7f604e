"""Clients that hold parts of the model: each entry is averaged over those that hold it, whatever gets lost."""

import logging

import numpy as np
import pytest

from fedkit.arrays import flatten, flatten_mask, schema_digest, squared_norm, subtract, zeros_like
from fedkit.broadcast import receive
from fedkit.clients import AquilaMod, ErrorFeedbackMod
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.wire import Codec
from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.memory import ClientMemory
from fedkit.message import frame_record, read_instructions, to_arrays
from fedkit.parcel import read_parcel
from fedkit.rounds import RoundGrid
from fedkit.state import ClientState
from fedkit.strategies import Aquila, ErrorFeedback, Plain, Safari, Tac
from fedkit.submodels import SubModel, lora_rank, owned, take, whole
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, client_app, initial, targets

NUM = 5
OPTIONS = {"downlink": None, "fraction_evaluate": 0.0, "min_train_nodes": NUM, "min_available_nodes": NUM}


def odd(params):
    """No leading block: every other column of lora_A, and nothing of lora_B."""
    return SubModel({"lora_A": (np.arange(4), np.arange(1, 12, 2))})


SUBMODELS = {"r1": lora_rank(1), "r2": lora_rank(2, lora_alpha=3, server_lora_alpha=4), "odd": odd}
HELD = ["r1", "r2", "odd", "r2", ""]  # by client; the last holds the whole
CUTS = SUBMODELS | {"": whole}


def federation(held=HELD, mods=None, spies=()):
    """Clients that pull their part towards theirs of the target."""
    apps = [
        client_app([*spies, *(mods or [AquilaMod()])], take(t, CUTS.get(name, whole)(LIKE)), num_examples=3 + i)
        for i, (t, name) in enumerate(zip(targets(len(held)), held, strict=True))
    ]
    grid = InProcessGrid(apps)
    for context, name in zip(grid.contexts.values(), held, strict=True):
        if name:
            context.node_config["submodel"] = name
    return grid


def run(strategy, grid, rounds=8, faults=None):
    wrapped = RoundGrid(grid, faults=faults)
    result = strategy.start(wrapped, initial(), num_rounds=rounds)
    return to_arrays(result.arrays), wrapped


def submodel_of(name):
    return CUTS[name](LIKE)


def entries_of(name):
    return flatten_mask(owned(submodel_of(name), like=LIKE))


def scales_of(name):
    """What each entry of the whole is multiplied by on its way to a client."""
    scales = submodel_of(name).scales
    return np.concatenate([np.full(a.size, scales.get(n, 1.0)) for n, a in LIKE.items()])


@pytest.mark.parametrize(("make", "mod"), [(Plain, AquilaMod), (ErrorFeedback, ErrorFeedbackMod)])
def test_agrees_with_a_loop_over_entries(make, mod):
    ours, _ = run(make(quantizer=None, submodels=SUBMODELS, **OPTIONS), federation(mods=[mod()]), rounds=6)
    goals = [flatten(t) for t in targets(NUM)]
    theta = np.zeros(88)
    for _ in range(6):
        step = np.zeros(88)
        for entry in range(88):
            total = value = 0.0
            for i, name in enumerate(HELD):
                if entries_of(name)[entry]:
                    total += 3 + i
                    value += (3 + i) * 0.3 * (goals[i][entry] - theta[entry])
            step[entry] = value / total
        theta += step
    np.testing.assert_allclose(flatten(ours), theta, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [Aquila, Plain])
def test_if_all_hold_the_whole_nothing_changes(make):
    ours, _ = run(make(submodels={"all": whole}, **OPTIONS), federation(["all"] * 3 + [""] * 2))
    plain, _ = run(make(**OPTIONS), federation([""] * NUM))
    assert all(ours[name].tobytes() == plain[name].tobytes() for name in plain)


class Watched(Aquila):
    """After every round: the step is the mean of what clients believe the server has of them, entry by entry."""

    def __init__(self, grid, **options):
        super().__init__(submodels=SUBMODELS, **OPTIONS | options)
        self.grid, self.checked = grid, 0

    def aggregate_train(self, server_round, replies):
        before = flatten(self._params)
        arrays, metrics = super().aggregate_train(server_round, replies)
        if arrays is not None:
            step = flatten(to_arrays(arrays)) - before
            np.testing.assert_allclose(step, self.believed(), rtol=1e-5, atol=1e-6)
        return arrays, metrics

    def believed(self):
        sums, totals = np.zeros(88), np.zeros(88)
        for i, (context, name) in enumerate(zip(self.grid.contexts.values(), HELD, strict=True)):
            if str(i) not in self.registry.accepted:
                continue
            state = dict(ClientState(context, self.progress.experiment).load())
            memory = ClientMemory(state, "aquila", like=take(zeros_like(LIKE), submodel_of(name)))
            arrays = memory.settle(self.registry.accepted[str(i)])
            assert memory.digest == self.registry.accepted[str(i)]
            sums[entries_of(name)] += (3 + i) * flatten(arrays) / scales_of(name)[entries_of(name)]
            totals[entries_of(name)] += 3 + i
            self.checked += 1
        return sums / np.maximum(totals, 1)


@pytest.mark.parametrize("fraction", [1.0, 0.6])
def test_the_lazy_mean_is_that_of_what_clients_believe_whatever_is_lost(fraction):
    grid = federation()
    strategy = Watched(grid, beta=0.3, fraction_train=fraction, min_train_nodes=2)
    _, wrapped = run(strategy, grid, 25, Faults(drop=0.3, seed=3))
    totals = [wrapped.ledger.round_totals(k) for k in range(1, 26)]
    assert strategy.checked > 60
    assert sum(t["skips"] for t in totals) > 0
    assert sum(t["rejected"] for t in totals) == 0


def test_an_entry_that_nobody_holds_stays():
    params, _ = run(Plain(submodels=SUBMODELS, **OPTIONS), federation(["r1", "r1", "r2", "r2", "r1"]))
    assert not params["lora_A"][2:].any()
    assert not params["lora_B"][:, 2:].any()
    assert params["lora_A"][:2].all()


def test_thresholds_are_over_the_entries_of_the_node_in_its_units():
    seen = []

    def spy(message, context, call_next):
        told = read_instructions(message)
        if not told.introduce:
            name = context.node_config.get("submodel", "")
            seen.append((told.server_round, name, told.options["skip-threshold"]))
        return call_next(message, context)

    history = []
    strategy = Aquila(beta=0.4, submodels=SUBMODELS, **OPTIONS)
    wrapped = RoundGrid(federation(spies=[spy]))
    strategy.start(wrapped, initial(), 4, evaluate_fn=lambda _, arrays: history.append(to_arrays(arrays)))
    for server_round, name, threshold in seen:
        if server_round > 1:
            now, before = (take(history[server_round - k], submodel_of(name)) for k in (1, 2))
            assert threshold == 0.4 * squared_norm(subtract(now, before)) > 0
    assert {name for _, name, _ in seen} == set(HELD)


def test_each_node_is_sent_and_sends_its_part_alone():
    seen = []

    def spy(message, context, call_next):
        sent = receive(read_parcel(message.content), {}) if message.content.array_records else None
        reply = call_next(message, context)
        if sent is not None:
            ((record,),) = [r.values() for r in reply.content.array_records.values()]
            seen.append((context.node_config.get("submodel", ""), schema_digest(sent), len(record.data)))
        return reply

    run(Plain(submodels=SUBMODELS, **OPTIONS), federation(spies=[spy]), 2)
    assert len(seen) == 10
    for name, digest, size in seen:
        part = take(LIKE, submodel_of(name))
        assert digest == schema_digest(part)
        assert size == len(Codec().encode(part))


def test_an_unknown_name_is_refused_alone(caplog):
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, _ = run(
            Plain(submodels=SUBMODELS, **OPTIONS | {"min_train_nodes": 2}),
            federation(["r1", "r2", "r64", "r2", ""]),
            3,
        )
    alone, _ = run(
        Plain(submodels=SUBMODELS, **OPTIONS),
        federation(["r1", "r2", "r1", "r2", ""]),
        3,
        Faults(rates={"2": 1.0}),
    )
    assert "node 1002 holds sub-model 'r64'" in caplog.text
    np.testing.assert_allclose(flatten(params), flatten(alone), atol=1e-6)


def test_a_client_that_changes_its_part_starts_anew(caplog):
    grid = federation()

    class Changing(Aquila):
        def aggregate_train(self, server_round, replies):
            result = super().aggregate_train(server_round, replies)
            if server_round == 3:
                grid.contexts[1000].node_config["submodel"] = "r2"
                grid.apps[1000] = client_app(
                    [AquilaMod()], take(targets(NUM)[0], submodel_of("r2")), num_examples=3
                )
            return result

    strategy = Changing(beta=0.0, quantizer=ZeroMidTread(16, 16), submodels=SUBMODELS, **OPTIONS)
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, wrapped = run(strategy, grid, 60)
    wanted, _ = run(Plain(submodels=SUBMODELS, **OPTIONS), federation(["r2", *HELD[1:]]), 60)
    assert wrapped.ledger.round_totals(4)["rejected"] == 1
    assert sum(wrapped.ledger.round_totals(k)["rejected"] for k in range(5, 61)) == 0
    assert strategy.state.submodels["0"] == "r2"
    np.testing.assert_allclose(flatten(params), flatten(wanted), atol=1e-3)


def test_a_lie_about_the_part_and_a_hostile_shape_are_refused(caplog):
    def liar(message, context, call_next):
        reply = call_next(message, context)
        if context.node_id == 1000 and reply.content.array_records:
            reply.content["fedkit"]["fedkit-option-submodel"] = "r2"
        if context.node_id == 1001 and reply.content.array_records:
            (key,) = reply.content.array_records
            reply.content[key] = frame_record(Codec().encode(LIKE))
        return reply

    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, wrapped = run(Aquila(submodels=SUBMODELS, **OPTIONS), federation(spies=[liar]), 2)
    assert wrapped.ledger.round_totals(1)["rejected"] == 2
    assert "was sent sub-model 'r1' and says that it holds 'r2'" in caplog.text
    assert "node 1001: reply refused" in caplog.text
    assert flatten(params).any()


def test_a_resumed_run_knows_who_holds_what(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKIT_STATE_DIR", str(tmp_path / "clients"))

    def resumed(folder, *stops):
        for stop in stops:
            strategy = Aquila(beta=0.3, submodels=SUBMODELS, checkpoint=tmp_path / folder, **OPTIONS)
            params, _ = run(strategy, federation(), stop)
        return params, strategy

    once, _ = resumed("once", 8)
    twice, strategy = resumed("twice", 3, 8)
    assert all(once[name].tobytes() == twice[name].tobytes() for name in once)
    assert strategy.state.submodels == {"0": "r1", "1": "r2", "2": "odd", "3": "r2"}
    with pytest.raises(ConfigError, match="expected parts None"):
        run(Aquila(beta=0.3, checkpoint=tmp_path / "once", **OPTIONS), federation(), 9)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Aquila(submodels=SUBMODELS), "downlink: nodes with sub-models are sent other arrays"),
        (lambda: Aquila(submodels=SUBMODELS, memory="sum", **OPTIONS), "memory='sum'"),
        (lambda: Aquila(submodels={"": whole}, **OPTIONS), "needs a name"),
        (lambda: Safari(submodels=SUBMODELS, sparse_model=True, **OPTIONS), "sparse_model: a model's entries"),
        (lambda: Tac(num_clusters=2, density=0.5, submodels=SUBMODELS, **OPTIONS), "density: not with submodels"),
        (lambda: run(Plain(submodels={"r9": lora_rank(9)}, **OPTIONS), federation(), 1), "axis 0"),
    ],
)
def test_what_does_not_compose_is_refused_with_the_reason(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()


def test_nodes_that_hold_the_whole_need_no_config():
    params, _ = run(Plain(submodels=SUBMODELS, **OPTIONS), federation([""] * NUM), 3)
    plain, _ = run(Plain(**OPTIONS), federation([""] * NUM), 3)
    assert all(params[name].tobytes() == plain[name].tobytes() for name in plain)
