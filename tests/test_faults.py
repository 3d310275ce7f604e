"""The fault schedule: what is drawn, what is recorded, what is refused."""

import dataclasses
import hashlib
import itertools
import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedkit import faults
from fedkit.errors import ConfigError
from fedkit.faults import Bursts, Event, Faults

RICH = Faults(
    drop=0.2,
    seed=5,
    rates={"3": 0.8},
    start_round=2,
    groups={"site-*": 0.5},
    bursts=Bursts(0.1, 0.4, 0.01, 0.9),
    late=0.3,
    mean_delay=2.0,
    duplicate=0.1,
    client_crash=0.05,
    server_crash_rounds=(4, 9),
    events=(Event(1, "0", lost=True), Event(6, crash=True), Event(7, "3", delay=2.5, duplicate=True)),
)
ROUNDS, CLIENTS = range(40), ["0", "1", "3", "site-a", "é"]
KINDS = ["loses", "delay", "duplicates", "client_crashes"]

probabilities = st.floats(0, 1)
rates = st.dictionaries(st.sampled_from([*CLIENTS, "*", "[0-9]", "site-*"]), probabilities, max_size=3)
events = st.builds(
    Event,
    st.integers(0, 12),
    st.sampled_from(CLIENTS),
    st.booleans(),
    st.floats(0, 100),
    st.booleans(),
    st.booleans(),
) | st.builds(Event, st.integers(0, 12), crash=st.booleans())
schedules = st.builds(
    Faults,
    drop=probabilities,
    seed=st.integers(0, 2**40),
    rates=rates,
    start_round=st.integers(0, 5),
    groups=rates,
    bursts=st.none() | st.builds(Bursts, st.floats(0.01, 1), probabilities, probabilities, probabilities),
    late=probabilities,
    mean_delay=st.floats(0, 1e9),
    duplicate=probabilities,
    client_crash=probabilities,
    server_crash_rounds=st.lists(st.integers(0, 12), max_size=3).map(tuple),
    events=st.lists(events, max_size=5).map(tuple),
)


def happenings(schedule, kind, rounds=ROUNDS, clients=CLIENTS):
    return [getattr(schedule, kind)(k, c) for k in rounds for c in clients]


def digest(data):
    return hashlib.sha256(data).hexdigest()[:16]


def assert_rate(hits, expected):
    """Within five standard deviations of the binomial law."""
    assert abs(np.mean(hits) - expected) <= 5 * math.sqrt(expected * (1 - expected) / len(hits)), np.mean(hits)


# One schedule everywhere


def test_a_schedule_is_the_same_on_every_machine_and_in_every_version():
    assert digest(RICH.trace(ROUNDS, CLIENTS).encode()) == "49c91b15f3e1ecd1"


def test_single_losses_are_those_of_the_first_version():
    early = Faults(0.3, 5, {"3": 0.8}, 4)
    lost = happenings(early, "loses", range(60), ["0", "3", "site-a", "é"])
    lost += happenings(Faults(0.5, 2**40 + 1), "loses", range(1, 60), "0123")
    assert digest(bytes(lost)) == "ffd2d9b47d42e996"


def test_another_process_draws_the_same():
    code = "import sys; from fedkit.faults import Faults; "
    code += f"sys.stdout.buffer.write(Faults.from_json(sys.argv[1]).trace({ROUNDS}, {CLIENTS}).encode())"
    done = subprocess.run([sys.executable, "-c", code, RICH.to_json()], capture_output=True, check=True)
    assert done.stdout.decode() == RICH.trace(ROUNDS, CLIENTS)


def test_the_order_of_the_questions_does_not_matter():
    places = list(itertools.product([*range(20), 255, 256, 1000], CLIENTS))
    forward = {place: RICH.loses(*place) for place in places}
    faults._chain.cache_clear()
    assert {place: RICH.loses(*place) for place in reversed(places)} == forward


def test_who_made_a_schedule_cannot_change_it():
    mine = {"7": 1.0}
    schedule = Faults(rates=mine)
    mine["7"] = 0.0
    assert schedule.loses(1, "7")


# Rates


@pytest.mark.parametrize("rate", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize(
    ("name", "kind"),
    [("drop", "loses"), ("late", "delay"), ("duplicate", "duplicates"), ("client_crash", "client_crashes")],
)
def test_each_kind_comes_as_often_as_its_field_says(name, kind, rate):
    schedule = Faults(**{name: rate}, seed=1)
    hits = np.array(happenings(schedule, kind, range(1, 201), "0123456789")) > 0
    assert_rate(hits, rate)
    others = [happenings(schedule, other) for other in KINDS if other != kind]
    assert not np.any(others), "one field, one kind"


def test_delays_are_exponential():
    delays = happenings(Faults(late=1.0, mean_delay=2.0), "delay", range(1, 501), "0123456789")
    assert abs(np.mean(delays) - 2.0) < 5 * 2.0 / math.sqrt(len(delays))
    assert_rate(np.array(delays) > 2.0 * math.log(2), 0.5)
    assert all(delay == round(delay, 6) for delay in delays)


def test_whose_rate_is_whose():
    schedule = Faults(drop=1.0, groups={"site-a-*": 0.0, "[0-4]": 1.0, "*-9": 1.0}, rates={"2": 0.0})
    lost = {c: schedule.loses(1, c) for c in ["site-a-1", "site-a-9", "3", "33", "2", "SITE-A-1"]}
    assert lost == {"site-a-1": 0, "site-a-9": 1, "3": 1, "33": 1, "2": 0, "SITE-A-1": 1}
    turned = dataclasses.replace(schedule, groups=dict(reversed(schedule.groups.items())))
    assert turned == schedule
    assert turned.loses(1, "site-a-9")
    assert_rate(happenings(Faults(groups={"[0-4]": 0.3}), "loses", range(1, 401), "01234"), 0.3)


def test_nothing_is_drawn_before_the_first_round_but_what_is_listed_happens():
    schedule = dataclasses.replace(RICH, start_round=30)
    listed = Faults(server_crash_rounds=RICH.server_crash_rounds, events=RICH.events)
    assert schedule.trace(range(30), CLIENTS) == listed.trace(range(30), CLIENTS)
    assert schedule.trace(range(30, 40), CLIENTS) == RICH.trace(range(30, 40), CLIENTS)


def test_the_server_crashes_in_the_rounds_listed():
    assert [k for k in ROUNDS if RICH.server_crashes(k)] == [4, 6, 9]


# Bursts


@pytest.mark.parametrize(("begin", "end"), [(0.02, 0.1), (0.3, 0.3), (0.9, 0.7), (1.0, 0.5), (0.05, 1.0)])
def test_bursts_last_and_come_as_often_as_a_markov_chain_says(begin, end):
    schedule, clients, rounds = Faults(bursts=Bursts(begin, end), seed=2), map(str, range(40)), 500
    lost = np.array(happenings(schedule, "loses", range(1, rounds + 1), list(clients))).reshape(rounds, -1).T
    from_good, from_bad = lost[:, 1:][~lost[:, :-1]], lost[:, 1:][lost[:, :-1]]
    assert_rate(from_good, begin)
    assert_rate(from_bad, 1 - end)
    lengths = [len(list(run)) for row in lost for bad, run in itertools.groupby(row) if bad]
    assert abs(np.mean(lengths) - 1 / end) < 0.1 / end
    assert abs(lost.mean() - begin / (begin + end)) < 0.03


@pytest.mark.parametrize("k", [1, 300])
def test_bursts_are_stationary_from_the_first_round(k):
    schedule = Faults(bursts=Bursts(0.02, 0.06))
    assert_rate([schedule.loses(k, str(c)) for c in range(1000)], 0.25)


def test_each_state_has_its_loss():
    bursts = Bursts(0.1, 0.3, loss_good=0.1, loss_bad=0.7)
    bad = happenings(Faults(bursts=Bursts(0.1, 0.3)), "loses", range(1, 301), "0123456789")
    lost = np.array(happenings(Faults(bursts=bursts), "loses", range(1, 301), "0123456789"))
    assert_rate(lost[np.array(bad)], 0.7)
    assert_rate(lost[~np.array(bad)], 0.1)


def test_a_late_round_costs_no_more_than_an_early_one():
    schedule = Faults(bursts=Bursts(0.1, 0.2))
    faults._chain.cache_clear()
    for k in range(1, 3000):
        schedule.loses(k, "7")
    assert faults._chain.cache_info().misses <= math.log2(3000)


# Streams


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_does_not_change_with_the_others(kind):
    own = {
        "loses": ["drop", "rates", "groups", "bursts"],
        "delay": ["late", "mean_delay"],
        "duplicates": ["duplicate"],
        "client_crashes": ["client_crash"],
    }[kind]
    alone = Faults(**{name: getattr(RICH, name) for name in [*own, "seed", "start_round", "events"]})
    assert happenings(alone, kind) == happenings(RICH, kind)


def test_kinds_clients_rounds_and_seeds_are_uncorrelated():
    half = {"drop": 0.5, "late": 0.5, "duplicate": 0.5, "client_crash": 0.5}

    def drawn(kind, shift=0, seed=0, clients="0123456789"):
        return np.array(happenings(Faults(**half, seed=seed), kind, range(1 + shift, 201 + shift), clients)) > 0

    draws = [drawn(kind) for kind in KINDS]
    draws += [drawn("loses", shift=200), drawn("loses", seed=1), drawn("loses", clients="abcdefghij")]
    bursty = Faults(bursts=Bursts(0.5, 0.5))
    draws.append(np.array(happenings(bursty, "loses", range(1, 201), "0123456789")))
    correlations = np.corrcoef(draws) - np.eye(len(draws))
    assert np.abs(correlations).max() < 5 / math.sqrt(2000)


# Traces and JSON


def test_exactly_what_a_trace_says_happens(tmp_path):
    path = tmp_path / "trace.jsonl"
    path.write_text('{"round": 3, "client": "7", "lost": true}\n\n{"round":3,"client":"7","delay":2.5}\n')
    schedule = Faults.from_trace(path)
    assert schedule.loses(3, "7")
    assert schedule.delay(3, "7") == 2.5
    lines = schedule.trace(range(10), map(str, range(10))).splitlines()
    assert [json.loads(line) for line in lines] == [{"round": 3, "client": "7", "lost": True, "delay": 2.5}]


@settings(max_examples=25, deadline=None)
@given(schedules)
def test_a_trace_behaves_as_the_schedule_it_records(tmp_path_factory, schedule):
    path = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    text = schedule.trace(range(12), CLIENTS)
    path.write_text(text, "utf-8")
    recorded = Faults.from_trace(path)
    assert recorded.trace(range(12), CLIENTS) == text
    for kind in KINDS:
        assert happenings(recorded, kind, range(12)) == happenings(schedule, kind, range(12))
    assert [recorded.server_crashes(k) for k in range(12)] == [schedule.server_crashes(k) for k in range(12)]


@settings(max_examples=50, deadline=None)
@given(schedules)
def test_json_brings_back_the_same_value(schedule):
    assert Faults.from_json(schedule.to_json()) == schedule


def test_json_is_one_short_line():
    assert Faults().to_json() == "{}"
    assert (
        Faults(drop=0.3, bursts=Bursts(0.1, 0.5)).to_json()
        == '{"drop": 0.3, "bursts": {"begin": 0.1, "end": 0.5}}'
    )
    assert "\n" not in RICH.to_json()


# What is refused

PROBABILITY = (1.5, -0.1, math.nan, True, "0.5", None)
COUNT = (-1, 1.0, True, "1", None)
BAD_FIELDS = [
    *((name, bad) for name in ("drop", "late", "duplicate", "client_crash") for bad in PROBABILITY),
    *((name, bad) for name in ("seed", "start_round") for bad in COUNT),
    *((name, {"7": bad}) for name in ("rates", "groups") for bad in PROBABILITY),
    *((name, bad) for name in ("rates", "groups") for bad in (0.5, None, {7: 0.5}, ["7"])),
    *(("mean_delay", bad) for bad in (-1.0, math.inf, math.nan, True, "1", None)),
    *(("server_crash_rounds", (bad,)) for bad in COUNT),
    *(("server_crash_rounds", bad) for bad in (3, "3", None)),
    *(("events", bad) for bad in ((3,), "3", None, ({"round": 3},))),
    *(("bursts", bad) for bad in (0.5, {"begin": 0.1, "end": 0.1})),
]
BAD_EVENTS = [
    *(("round", bad) for bad in COUNT),
    ("client", 7),
    *((name, bad) for name in ("lost", "duplicate", "crash") for bad in (1, "true", None)),
    *(("delay", bad) for bad in (-1.0, math.inf, math.nan, True, "1", None)),
]


@pytest.mark.parametrize(("name", "bad"), BAD_FIELDS)
def test_a_field_that_can_never_work_is_refused_by_name(name, bad):
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*, got "):
        Faults(**{name: bad})


@pytest.mark.parametrize(("name", "bad"), BAD_EVENTS)
def test_an_event_that_cannot_happen_is_refused_by_name(name, bad):
    with pytest.raises(ConfigError, match=rf"^{name}: expected .*, got "):
        Event(**({"round": 3, "client": "7"} | {name: bad}))


@pytest.mark.parametrize("what", [{"lost": True}, {"delay": 1.0}, {"duplicate": True}])
def test_only_a_crash_can_be_the_servers(what):
    with pytest.raises(ConfigError, match=r"^client: expected .*, got none"):
        Event(3, **what)


@pytest.mark.parametrize("name", ["begin", "end", "loss_good", "loss_bad"])
@pytest.mark.parametrize("bad", PROBABILITY)
def test_bursts_that_can_never_work_are_refused_by_name(name, bad):
    with pytest.raises(ConfigError, match=rf"^{name}: expected a probability, 0 to 1, got "):
        Bursts(**({"begin": 0.1, "end": 0.1} | {name: bad}))


def test_a_chain_that_never_moves_has_no_stationary_state():
    with pytest.raises(ConfigError, match="begin, end: expected one of them above 0"):
        Bursts(0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("drop=0.3", "faults: expected JSON, got 'drop=0.3'"),
        ("9" * 5000, "faults: expected JSON"),
        ("[]", r"faults: expected a JSON object, got \[\]"),
        ('{"dorp": 0.3}', "faults: unknown or missing key 'dorp'.*drop"),
        ('{"_said": {}}', "faults: unknown or missing key '_said'"),
        ('{"drop": "0.3"}', "faults: drop: expected a probability"),
        ('{"drop": NaN}', "faults: drop: expected a probability"),
        ('{"seed": 1.5}', "faults: seed: expected a whole number"),
        ('{"server_crash_rounds": 3}', "faults: server_crash_rounds: expected rounds, got 3"),
        ('{"rates": [["7", 0.5]]}', "faults: rates: expected probabilities"),
        ('{"bursts": 0.5}', "faults: bursts: expected bursts, got 0.5"),
        ('{"bursts": {"begin": 0.1}}', "faults: bursts: unknown or missing key 'end'"),
        ('{"bursts": {"begin": 0.1, "end": 2}}', "faults: bursts: end: expected a probability"),
        ('{"bursts": {"begin": 0.1, "end": 1, "mean": 2}}', "faults: bursts: unknown or missing key 'mean'"),
        ('{"events": {"round": 3}}', "faults: events: expected events"),
        ('{"events": [3]}', r"faults: events\[0\]: expected a JSON object"),
        ('{"events": [{"round": 3}, {"client": "7"}]}', r"faults: events\[1\]: unknown or missing key 'round'"),
    ],
)
def test_json_that_can_never_work_is_refused_by_key(text, message):
    with pytest.raises(ConfigError, match=message):
        Faults.from_json(text)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"lost\n", "expected a file of JSON lines"),
        (b"\xff\n", "expected a file of JSON lines"),
        (b"[3]\n", r"events\[0\]: expected a JSON object"),
        (
            b'{"round": 3}\n{"round": 3, "client": "7", "lots": true}\n',
            r"events\[1\]: unknown or missing key 'lots'",
        ),
        (
            b'{"round": 3, "client": 7, "lost": true}\n',
            r"events\[0\]: client: expected a client id, as text, got 7",
        ),
        (b'{"round": 3, "lost": true}\n', r"events\[0\]: client: expected whose reply"),
    ],
)
def test_a_trace_that_can_never_work_is_refused_by_file_and_place(tmp_path, data, message):
    path = tmp_path / "trace.jsonl"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=rf"trace\.jsonl: .*{message}|trace\.jsonl: {message}"):
        Faults.from_trace(path)
    with pytest.raises(ConfigError, match=r"missing\.jsonl: expected a file of JSON lines"):
        Faults.from_trace(tmp_path / "missing.jsonl")
