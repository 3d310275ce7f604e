"""The server decides by profile: part, bits and run config; a client over its memory budget costs its reply."""

import logging

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import LoraConfig, get_peft_model

from fedkit.arrays import flatten, num_values
from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod
from fedkit.clients.adapters import get_adapter, set_adapter
from fedkit.clients.profiles import Profile
from fedkit.clients.rm_lora import train_rm_lora
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.wire import read_header
from fedkit.errors import ConfigError
from fedkit.message import from_arrays, read_frame, read_report, run_config_of, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Aquila, Budget, ErrorFeedback, Plain, Safari, Terms
from fedkit.submodels import lora_rank
from tests.helpers.grid import InProcessGrid
from tests.helpers.tiny_lora import TinyNet, rm_config, tiny_batches

RANK, RUN_CONFIG = 8, {"r": 8, "lora-alpha": 16, "batch-size": 8}
TERMS = {
    "mobile": Terms(
        cut=lora_rank(2),
        quantizer=ZeroMidTread(2, 2),
        config={"r": 2, "lora-alpha": 4, "batch-size": 4, "step": 9},
    ),
    "r4": lora_rank(4),
}
NODES = [{"profile": "cpu"}, {"profile": "mobile"}, {"profile": "mobile", "submodel": "r4"}, {}]
OPTIONS = {"downlink": None, "fraction_evaluate": 0.0, "min_train_nodes": 4, "min_available_nodes": 4}


def model_of(r, lora_alpha):
    torch.manual_seed(0)
    config = LoraConfig(r=r, lora_alpha=lora_alpha, target_modules=["hidden", "middle"], modules_to_save=["head"])
    return get_peft_model(TinyNet(), config)


def client(mod, seen):
    """A client as in the examples: it trains what it is sent as it is told."""
    app = ClientApp(mods=[spy(seen), mod()])

    @app.train()
    def train(message, context):
        told, profile = run_config_of(message, context), Profile.of(context)
        (record,) = message.content.array_records.values()
        arrays = to_arrays(record)
        (first, *_) = (array for name, array in arrays.items() if "lora_A" in name)
        config = rm_config(r=len(first), active_rank=len(first))
        model = profile.prepare(model_of(len(first), 2 * len(first)))
        set_adapter(model, arrays)
        seen.setdefault(context.node_id, {})["told"] = (len(first), told)
        metrics = train_rm_lora(model, tiny_batches(), config, learning_rate=1e-2, seed=0, profile=profile)
        return Message(
            RecordDict(
                {
                    "arrays": from_arrays(get_adapter(model)),
                    "metrics": MetricRecord({"num-examples": 3, **metrics}),
                }
            ),
            reply_to=message,
        )

    return app


def spy(seen):
    """Note what each node says, and sends."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        mine = seen.setdefault(context.node_id, {"reports": []})
        if reply.has_content():
            mine.setdefault("reports", []).append(dict(read_report(reply.content).options))
            if reply.content.array_records:
                mine["frame"] = read_frame(reply.content)
        else:
            mine.setdefault("errors", []).append(reply.error.reason)
        return reply

    return mod


@pytest.fixture
def _float_mobiles(monkeypatch):
    """What is tested here does not depend on int8, nor on the extra `mobile`."""
    from fedkit.clients import profiles

    monkeypatch.setitem(profiles.PROFILES, "mobile", Profile(name="mobile", micro_batch=4))


def run(strategy, mod=AquilaMod, nodes=NODES, rounds=2, train_config=None):
    seen = {}
    grid = InProcessGrid([client(mod, seen) for _ in nodes])
    for context, config in zip(grid.contexts.values(), nodes, strict=True):
        context.node_config.update(config)
        context.run_config = dict(RUN_CONFIG)
    wrapped = RoundGrid(grid)
    initial = from_arrays(get_adapter(model_of(RANK, 2 * RANK)))
    result = strategy.start(wrapped, initial, num_rounds=rounds, train_config=train_config)
    return to_arrays(result.arrays), wrapped, seen


@pytest.mark.usefixtures("_float_mobiles")
@pytest.mark.parametrize(("make", "mod"), [(Aquila, AquilaMod), (ErrorFeedback, ErrorFeedbackMod)])
def test_rank_bits_and_config_are_those_of_the_profile(make, mod):
    params, grid, seen = run(make(quantizer=ZeroMidTread(8, 8), submodels=TERMS, **OPTIONS), mod)
    ranks = [seen[1000 + i]["told"][0] for i in range(4)]
    assert ranks == [8, 2, 4, 8]  # the node config's submodel goes before the profile
    told = [seen[1000 + i]["told"][1] for i in range(4)]
    assert told[1] == {"r": 2, "lora-alpha": 4, "batch-size": 4}  # what is no key of the run config is the app's
    assert told[0] == told[2] == told[3] == RUN_CONFIG
    sizes = [8 * len(seen[1000 + i]["frame"]) / read_header(seen[1000 + i]["frame"]).count for i in range(4)]
    assert sizes[1] < sizes[0]
    assert grid.ledger.round_totals(2)["rejected"] == 0
    assert grid.ledger.round_totals(2)["replies"] == 4
    assert flatten(params).any()


@pytest.mark.usefixtures("_float_mobiles")
def test_a_client_is_asked_once_and_says_what_it_has():
    _, _, seen = run(Plain(submodels=TERMS, **OPTIONS))
    for node in seen.values():
        asked, first, second = node["reports"]
        assert {"profile", "cores", "memory-mb"} <= set(asked)
        assert "profile" not in first
        assert first == second


@pytest.mark.usefixtures("_float_mobiles")
def test_without_terms_nobody_is_asked():
    _, _, seen = run(Plain(**OPTIONS), nodes=[{"profile": "mobile"}] * 4)
    assert all(len(node["reports"]) == 2 and "profile" not in node["reports"][0] for node in seen.values())


@pytest.mark.usefixtures("_float_mobiles")
def test_terms_without_a_part_go_with_a_coded_downlink_and_with_safari():
    terms = {"mobile": Terms(quantizer=ZeroMidTread(2, 2), config={"batch-size": 4})}
    options = OPTIONS | {"downlink": ErrorFeedback().downlink.codec}
    for make, mod in ((ErrorFeedback, ErrorFeedbackMod), (Safari, SafariMod)):
        _, grid, seen = run(make(submodels=terms, **options), mod, [{}, {"profile": "mobile"}, {}, {}], rounds=3)
        assert seen[1001]["told"] == (8, RUN_CONFIG | {"batch-size": 4})
        assert [grid.ledger.round_totals(k)["replies"] for k in (1, 2, 3)] == [4, 4, 4]


@pytest.mark.usefixtures("_float_mobiles")
def test_what_the_server_says_of_a_round_goes_before_the_run_config():
    config = ConfigRecord({"batch-size": 2})
    _, _, seen = run(Plain(submodels=TERMS, **OPTIONS), rounds=1, train_config=config)
    assert [seen[1000 + i]["told"][1]["batch-size"] for i in range(4)] == [2, 4, 2, 2]


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Aquila(submodels=TERMS), "downlink: nodes with sub-models"),
        (
            lambda: ErrorFeedback(
                submodels={"mobile": Terms(quantizer=EntropyConstrained(0.2))}, budget=Budget(client_bytes=10**6)
            ),
            "a budget sets the rate of all nodes",
        ),
    ],
)
def test_what_does_not_compose_is_refused_with_the_reason(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()


def test_a_client_over_its_budget_answers_with_the_reason_and_the_round_goes_on(caplog):
    nodes = [{"profile": "cpu"}, {"profile": "cpu", "memory-mb": 50}, {"profile": "cpu"}, {"profile": "cpu"}]
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, grid, seen = run(Aquila(**OPTIONS), nodes=nodes, rounds=2)
    assert "MemoryBudgetError: memory: expected at most 50 MB resident, got " in seen[1001]["errors"][0]
    assert "expected at most 50 MB resident" in caplog.text
    for k in (1, 2):
        totals = grid.ledger.round_totals(k)
        assert totals["replies"] == 3
        assert totals["asked"] == 4
    alone, _, _ = run(Aquila(**OPTIONS | {"min_train_nodes": 3, "min_available_nodes": 3}), nodes=nodes[:1] * 3)
    assert num_values(params) == num_values(alone)
    np.testing.assert_allclose(flatten(params), flatten(alone), atol=1e-5)
