"""AQUILA against plain FedAvg and against an obvious twin; and what it does with bad replies."""

import logging

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedkit.clients import AquilaMod
from fedkit.codec.quantize import AquilaMidTread, ZeroMidTread
from fedkit.errors import ConfigError, QuorumError
from fedkit.message import FRAME, STYPE, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.strategies import Aquila
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, client_app, initial, targets

EVERYBODY = {"fraction_evaluate": 0.0, "min_train_nodes": 4, "min_available_nodes": 4}
DENSE = EVERYBODY | {"downlink": None}


def clients(num=4, **options):
    return [client_app([AquilaMod()], target, **options) for target in targets(num)]


def run(strategy, apps, rounds=10):
    grid = RoundGrid(InProcessGrid(apps))
    result = strategy.start(grid, initial(), num_rounds=rounds)
    return (to_arrays(result.arrays) if result.arrays else None), grid


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays.values()])


def test_nobody_skips_and_many_bits_is_fedavg():
    apps = [client_app([AquilaMod()], t, num_examples=n) for n, t in zip((1, 5, 9, 20), targets(4), strict=True)]
    ours, _ = run(Aquila(beta=0.0, quantizer=ZeroMidTread(16, 16), **DENSE), apps)
    theirs, _ = run(FedAvg(**EVERYBODY), apps)
    np.testing.assert_allclose(flat(ours), flat(theirs), atol=1e-4)


def test_permuting_clients_changes_nothing():
    apps = clients()
    one, _ = run(Aquila(**DENSE), apps)
    other, _ = run(Aquila(**DENSE), apps[::-1])
    np.testing.assert_allclose(flat(one), flat(other), atol=1e-6)


@pytest.mark.parametrize(
    ("quantizer", "weighted", "beta"), [(ZeroMidTread(), True, 0.3), (AquilaMidTread(), False, 2.0)]
)
def test_agrees_with_an_obvious_twin(quantizer, weighted, beta):
    """The paper's loop, written down without Flower, frames or memories on two sides."""
    rounds, rate, num = 12, 0.3, 4
    ours, grid = run(Aquila(beta=beta, quantizer=quantizer, weighted=weighted, **DENSE), clients(num), rounds)
    goals = [flat(t) for t in targets(num)]
    cuts = np.cumsum([a.size for a in LIKE.values()])[:-1] if quantizer.per_array else []
    theta, previous = np.zeros(88, np.float32), None
    q, skips = [np.zeros(88, np.float32) for _ in range(num)], 0
    for k in range(rounds):
        threshold = 0.0 if k == 0 else beta * np.square((theta - previous).astype(np.float64)).sum()
        for m in range(num):
            local = theta + np.float32(rate) * (goals[m] - theta)
            v = (local - theta) - q[m]
            coded = np.concatenate(
                [
                    group.dequantize(levels)
                    for group, levels in (quantizer.quantize([p], None) for p in np.split(v, cuts))
                ]
            )
            size = np.square(coded.astype(np.float64)).sum() + np.square((v - coded).astype(np.float64)).sum()
            if k > 0 and size <= threshold:
                skips += 1
            else:
                q[m] = q[m] + coded
        previous, theta = theta, theta + np.mean(np.stack(q).astype(np.float64), axis=0).astype(np.float32)
    np.testing.assert_allclose(flat(ours), theta, rtol=1e-5, atol=1e-6)
    assert sum(grid.ledger.round_totals(k)["skips"] for k in range(1, rounds + 1)) == skips
    assert (skips > 0) == isinstance(quantizer, ZeroMidTread), "at b* = 1 an innovation never gets small"


def test_one_array_per_message_both_ways():
    seen = []

    def spy(message, context, call_next):
        reply = call_next(message, context)
        seen.extend([message.content, reply.content])
        return reply

    class Peek:
        def __call__(self, message, context, call_next):
            arrays = [a for r in message.content.array_records.values() for a in r.values()]
            assert [a.stype for a in arrays] == [STYPE]
            return call_next(message, context)

    run(Aquila(**DENSE), [client_app([spy, Peek(), AquilaMod()], t) for t in targets(4)], rounds=1)
    replies = [c for c in seen[1::2] if c.array_records]
    assert len(replies) == 4
    assert all(list(record) == [FRAME] for c in replies for record in c.array_records.values())


def test_messages_to_different_nodes_share_no_record():
    strategy = Aquila(**DENSE)
    messages = strategy.configure_train(1, initial(), ConfigRecord({"lr": 0.1}), InProcessGrid(clients()))
    contents = [m.content for m in messages]
    assert len({id(c) for c in contents}) == len({id(c["config"]) for c in contents}) == 4
    assert all(c["config"]["lr"] == 0.1 for c in contents)


def test_a_client_of_another_rank_is_dropped_and_the_round_goes_on(caplog):
    def other_rank(local):
        return {"lora_A": np.zeros((8, 12), np.float32), "lora_B": np.zeros((10, 8), np.float32)}

    apps = [*clients(3), client_app([AquilaMod()], targets(4)[3], tamper=other_rank)]
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, grid = run(Aquila(**DENSE), apps, rounds=3)
    assert np.isfinite(flat(params)).all()
    assert flat(params).any()
    assert grid.ledger.round_totals(2)["rejected"] == 1
    assert grid.ledger.round_totals(2)["replies"] == 3
    assert "node 1003" in caplog.text
    assert "expected shape (4, 12), got (8, 12)" in caplog.text


def test_nan_is_refused_on_the_client(caplog):
    def diverge(local):
        return local | {"lora_B": np.full((10, 4), np.nan, np.float32)}

    apps = [*clients(3), client_app([AquilaMod()], targets(4)[3], tamper=diverge)]
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, grid = run(Aquila(**DENSE), apps, rounds=2)
    assert np.isfinite(flat(params)).all()
    assert "'lora_B' holds NaN" in caplog.text
    assert grid.ledger.round_totals(2)["rejected"] == 1


def hostile(change):
    """A mod outside ours that alters the coded reply, as a hostile client would."""

    def mod(message, context, call_next):
        reply = call_next(message, context)
        change(reply.content)
        return reply

    return mod


def _forge_frame(content):
    from fedkit.message import frame_record

    (key,) = content.array_records
    frame = bytearray(content[key][FRAME].data)
    frame[-1] ^= 0xFF
    content[key] = frame_record(bytes(frame))


def _forge_nan(content):
    import zlib

    from fedkit.codec.wire import Codec
    from fedkit.message import frame_record

    frame = bytearray(Codec().encode(LIKE))
    frame[25:29] = np.float32(np.nan).tobytes()
    frame[21:25] = zlib.crc32(frame[25:], zlib.crc32(frame[:21])).to_bytes(4, "little")
    (key,) = content.array_records
    content[key] = frame_record(bytes(frame))


def _huge(content):
    from fedkit.codec.wire import Codec
    from fedkit.message import frame_record

    (key,) = content.array_records
    content[key] = frame_record(Codec().encode({n: np.full(a.shape, 3e38, np.float32) for n, a in LIKE.items()}))


def _no_report(content):
    del content["fedkit"]


def _wrong_base(content):
    content["fedkit"]["base"] = b"another history!"


def _impersonate(content):
    content["fedkit"]["client-id"] = "0"


def _no_weight(content):
    content["fedkit"]["metrics/num-examples"] = 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_forge_frame, "checksum"),
        (_forge_nan, "NaN or infinite"),
        (_huge, "longer than"),
        (_no_report, "no report"),
        (_wrong_base, "history"),
        (_impersonate, "already"),
        (_no_weight, "num-examples"),
    ],
)
def test_a_bad_reply_is_named_counted_and_harmless(change, reason, caplog):
    good = clients(3)
    bad = client_app([hostile(change), AquilaMod()], targets(4)[3])
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, grid = run(Aquila(**DENSE), [*good, bad], rounds=2)
    alone, _ = run(Aquila(**{**DENSE, "min_train_nodes": 3, "min_available_nodes": 3}), good, rounds=2)
    np.testing.assert_array_equal(flat(params), flat(alone))
    assert grid.ledger.round_totals(1)["rejected"] == 1
    assert reason in caplog.text
    assert "node 1003" in caplog.text


def test_an_app_without_the_mod_fails_loudly_and_alone(caplog):
    apps = [*clients(3), client_app([], targets(4)[3])]
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        params, _ = run(Aquila(**DENSE), apps, rounds=1)
    assert flat(params).any()
    assert "lacks this strategy's mod" in caplog.text


def test_no_replies_keep_the_model():
    failing = ClientApp()

    @failing.train()
    def train(message, context):
        raise RuntimeError("out of battery")

    params, grid = run(Aquila(**DENSE), [failing] * 4, rounds=2)
    assert params is None or not flat(params).any()
    assert grid.ledger.round_totals(2)["rejected"] == 4


def test_waiting_for_nodes_ends():
    strategy = Aquila(min_available_nodes=9, node_timeout=0.0, fraction_evaluate=0.0)
    with pytest.raises(QuorumError, match="expected 9 nodes"):
        strategy.start(InProcessGrid(clients()), initial(), num_rounds=1)


def test_the_choice_of_clients_is_seeded():
    def chosen(seed):
        strategy = Aquila(fraction_train=0.5, min_train_nodes=2, seed=seed)
        grid = InProcessGrid(clients(6))
        return [
            tuple(m.metadata.dst_node_id for m in strategy.configure_train(k, initial(), ConfigRecord(), grid))
            for k in range(1, 6)
        ]

    assert chosen(0) == chosen(0) != chosen(1)
    assert all(len(nodes) == 3 for nodes in chosen(0))


def test_client_side_evaluation_sees_ordinary_arrays():
    strategy = Aquila(min_train_nodes=4, min_evaluate_nodes=4, min_available_nodes=4)
    result = strategy.start(InProcessGrid(clients()), initial(), num_rounds=5)
    losses = [m["eval-loss"] for m in result.evaluate_metrics_clientapp.values()]
    assert losses == sorted(losses, reverse=True)


def test_impossible_options_are_refused_at_construction():
    with pytest.raises(ConfigError, match="beta"):
        Aquila(beta=-1.0)


def test_messages_of_other_strategies_pass_the_mod_untouched():
    apps = clients()
    with_mod, _ = run(FedAvg(**EVERYBODY), apps)
    without, _ = run(FedAvg(**EVERYBODY), [client_app([], t) for t in targets(4)])
    np.testing.assert_allclose(flat(with_mod), flat(without), atol=1e-6)


def test_client_id_prefers_the_configured_one():
    from fedkit.message import client_id

    def name(**node_config):
        config = {key.replace("_", "-"): value for key, value in node_config.items()}
        return client_id(Context(run_id=1, node_id=5, node_config=config, state=RecordDict(), run_config={}))

    assert name(client_id="clinic", partition_id=3) == "clinic"
    assert name(partition_id=3) == "3"
    assert name() == "5"
