"""The Grid wrapper, the ledger and the faults."""

import json

import numpy as np
import pytest
from flwr.app import MetricRecord
from flwr.serverapp.strategy import FedAvg

from fedkit.clients import AquilaMod
from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.flower import deflate, object_bytes
from fedkit.ledger import Ledger
from fedkit.rounds import RoundGrid
from fedkit.sockets import Traffic
from fedkit.strategies import Aquila
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import client_app, initial, targets

EVERYBODY = {"fraction_evaluate": 0.0, "min_train_nodes": 4, "min_available_nodes": 4}


def grid(**options):
    return RoundGrid(InProcessGrid([client_app([AquilaMod()], t) for t in targets(4)]), **options)


@pytest.mark.parametrize(
    "make", [lambda: Aquila(**EVERYBODY), lambda: FedAvg(**EVERYBODY)], ids=["aquila", "fedavg"]
)
def test_the_ledger_holds_the_size_of_every_object_that_travelled(make, monkeypatch):
    sizes = []
    answer = InProcessGrid.answer

    def spy(self, message):
        reply = answer(self, message)
        sizes.append((sum(map(len, deflate(message)[1].values())), sum(map(len, deflate(reply)[1].values()))))
        return reply

    monkeypatch.setattr(InProcessGrid, "answer", spy)
    wrapped = grid()
    make().start(wrapped, initial(), num_rounds=2)
    totals = [wrapped.ledger.round_totals(k) for k in (1, 2)]
    assert sum(t["downlink-bytes"] for t in totals) == sum(down for down, _ in sizes)
    assert sum(t["uplink-bytes"] for t in totals) == sum(up for _, up in sizes)


def test_a_lost_reply_was_still_sent():
    wrapped = grid(faults=Faults(drop=1.0))
    Aquila(**EVERYBODY).start(wrapped, initial(), num_rounds=1)
    totals = wrapped.ledger.round_totals(1)
    assert totals["missing"] == 4
    assert totals["replies"] == 0
    assert totals["uplink-bytes"] > 0


def test_what_the_socket_carried_is_entered_if_there_is_a_meter():
    class Meter:
        readings = iter([Traffic(10, 20), Traffic(110, 320), Traffic(150, 330), Traffic(155, 335)])

        def read(self):
            return next(self.readings)

    metered, plain = grid(meter=Meter()), grid()
    for wrapped in (metered, plain):
        Aquila(**EVERYBODY).start(wrapped, initial(), num_rounds=2)
    totals = [metered.ledger.round_totals(k) for k in (1, 2)]
    assert [(t["socket-uplink-bytes"], t["socket-downlink-bytes"]) for t in totals] == [(100, 300), (5, 5)]
    assert not [key for key in plain.ledger.round_totals(1) if key.startswith("socket")]


def test_object_bytes_is_what_flower_would_send():
    message = Aquila(**EVERYBODY).configure_train(1, initial(), __import__("flwr").app.ConfigRecord(), grid())[0]
    assert object_bytes(message) == sum(len(b) for b in deflate(message)[1].values()) > 4 * 88


def test_faults_depend_on_seed_round_and_client_alone():
    def lost(seed):
        return [Faults(0.3, seed).loses(k, str(c)) for k in range(200) for c in range(10)]

    assert lost(0) == lost(0) != lost(1)
    assert 0.27 < np.mean(lost(0)) < 0.33
    with pytest.raises(ConfigError, match="probability"):
        Faults(drop=1.5)


def test_recording_writes_a_line_per_round(tmp_path):
    wrapped = grid()
    evaluate = wrapped.ledger.recording(lambda k, _: MetricRecord({"accuracy": k / 10}), to=tmp_path / "run")
    Aquila(**EVERYBODY).start(wrapped, initial(), num_rounds=2, evaluate_fn=evaluate)
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert [line["round"] for line in lines] == [0, 1, 2]
    assert lines[2]["accuracy"] == 0.2
    assert lines[2]["fp32-bytes"] == 4 * 4 * 88
    assert lines[1]["asked"] == lines[1]["replies"] == 4
    assert lines[1]["uplink-bytes"] > 0


def test_recording_to_an_unwritable_place_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        Ledger().recording(lambda *_: None, to=tmp_path / "file" / "run")


def test_the_ledger_says_what_became_of_each_upload_and_what_training_measured(tmp_path):
    def tamper(local):
        return {name: np.full_like(a, np.nan) for name, a in local.items()}

    apps = [client_app([AquilaMod()], target) for target in targets(4)]
    apps[1] = client_app([AquilaMod()], targets(4)[1], tamper=tamper)
    wrapped = RoundGrid(InProcessGrid(apps), faults=Faults(rates={"3": 1 - 1e-12}))
    strategy = Aquila(**EVERYBODY)
    strategy.start(wrapped, initial(), num_rounds=2, evaluate_fn=wrapped.ledger.recording(None, to=tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    fates = {
        (line["client"], line["server-round"]): line["fate"] for line in lines if line["direction"] == "uplink"
    }
    assert {fate for (client, _), fate in fates.items() if client in "02"} <= {"", "skip"}
    assert fates["3", 1] == "lost"
    assert {fate for (client, _), fate in fates.items() if client not in "023"} == {"error"}
    (_, first, _) = map(json.loads, (tmp_path / "rounds.jsonl").read_text().splitlines())
    assert first["train"] == {"loss": 1.0}


def test_a_metric_that_is_no_number_is_recorded_as_json_has_it(tmp_path):
    wrapped = grid()
    broken = wrapped.ledger.recording(
        lambda server_round, arrays: MetricRecord({"accuracy": float("nan"), "per-class": [0.5, float("inf")]}),
        to=tmp_path,
    )
    Aquila(**EVERYBODY).start(wrapped, initial(), num_rounds=1, evaluate_fn=broken)
    lines = (tmp_path / "rounds.jsonl").read_text().splitlines()
    (first, last) = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert (first["accuracy"], last["per-class"]) == (None, [0.5, None])
