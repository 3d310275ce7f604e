"""What missing clients count with, in every strategy that has the choice: by value, and the laws."""

import json

import numpy as np
import pytest

from fedkit.aggregation.missing import CUTOFF, Known, Missing
from fedkit.aggregation.similarity import cosines, distances
from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod
from fedkit.codec.sparsify import TopK
from fedkit.codec.wire import open_frame
from fedkit.errors import ConfigError
from fedkit.faults import Event, Faults
from fedkit.flower import GridWrapper
from fedkit.message import read_frame, to_arrays
from fedkit.report import read_rounds
from fedkit.rounds import RoundGrid
from fedkit.row_masks import RowMask
from fedkit.skipping import SkipRule
from fedkit.strategies import Aquila, ErrorFeedback, Marina, Plain, Safari, Tac
from fedkit.submodels import lora_rank
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, client_app, initial, targets
from tests.helpers.stand_ins import Twin, flat

NUM = 5
EXAMPLES = (1, 5, 9, 20, 3)
OPTIONS = {"downlink": None, "fraction_evaluate": 0.0, "min_train_nodes": NUM, "min_available_nodes": NUM}
CHOICES = {
    "reweight": Missing("reweight"),
    "mifa": Missing("mifa"),
    "safari": Missing(own=True),
    "safari, nobody's own": Missing(own=False),
    "safari, no warm-up": Missing(own=False, warmup_rounds=0),
    "safari, distances": Missing(similarity="l2", warmup_rounds=1),
    "safari, models that move on": Missing(surrogate="update"),
}
STRATEGIES = {
    "plain": lambda **o: Plain(**OPTIONS, **o),
    "safari": lambda **o: Safari(density=0.5, **OPTIONS, **o),
    "sparse models": lambda **o: Safari(density=0.5, sparse_model=True, **OPTIONS, **o),
}


def clients(goals=None, examples=EXAMPLES):
    mods = [AquilaMod(), SafariMod(), ErrorFeedbackMod()]
    goals = goals or targets(NUM)
    return [client_app(mods, goal, num_examples=n) for n, goal in zip(examples, goals, strict=True)]


def run(strategy, apps=None, rounds=8, faults=None, spies=None, to=None):
    inner = InProcessGrid(apps or clients())
    if spies is not None:
        inner = Spy(inner)
        spies.append(inner)
    grid = RoundGrid(inner, faults=faults)
    record = grid.ledger.recording(None, to=to) if to else None
    result = strategy.start(grid, initial(), num_rounds=rounds, evaluate_fn=record)
    return flat(to_arrays(result.arrays)), result


class Spy(GridWrapper):
    """Keeps what was sent up: per round, the update and mask of each node."""

    def __init__(self, inner):
        super().__init__(inner)
        self.rounds = []

    def pull_messages(self, message_ids):
        replies = list(self.inner.pull_messages(message_ids))
        if replies:
            frames = {r.metadata.src_node_id: open_frame(read_frame(r.content), like=LIKE) for r in replies}
            self.rounds.append({str(node_id - 1000): frame for node_id, frame in frames.items()})
        return replies


# ---- by value --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("choice", CHOICES)
def test_agrees_with_an_obvious_twin(name, choice, tmp_path):
    spies, faults, missing = [], Faults(drop=0.4, seed=3), CHOICES[choice]
    ours, _ = run(STRATEGIES[name](missing=missing), faults=faults, spies=spies, to=tmp_path)
    twin, told = Twin(missing, sparse_model=name == "sparse models"), []
    for k, frames in enumerate(spies[0].rounds, start=1):
        arrived = {c: frame for c, frame in frames.items() if not faults.loses(k, c)}
        whole = np.ones(88, bool)
        sent = {c: (flat(f.arrays()), flat(f.mask) if f.mask else whole) for c, f in arrived.items()}
        twin.round(sent, {c: EXAMPLES[int(c)] for c in arrived})
        told.append(dict(twin.stand_ins))
    np.testing.assert_allclose(ours, twin.theta, rtol=1e-4, atol=1e-5)
    rows = read_rounds(tmp_path / "rounds.jsonl")[1:]
    assert [row.get("stand-ins", {}) for row in rows] == told


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("choice", CHOICES)
def test_nobody_missing_is_the_mean(name, choice):
    ours, _ = run(STRATEGIES[name](missing=CHOICES[choice]), rounds=3)
    mean, _ = run(STRATEGIES[name](missing="drop"), rounds=3)
    np.testing.assert_allclose(ours, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", CHOICES)
def test_permuting_clients_changes_nothing(choice):
    faults, make = Faults(drop=0.4), STRATEGIES["plain"]
    renamed = InProcessGrid(clients()[::-1])
    for i, context in enumerate(renamed.contexts.values()):
        context.node_config["client-id"] = str(NUM - 1 - i)
    result = make(missing=CHOICES[choice]).start(RoundGrid(renamed, faults=faults), initial(), num_rounds=8)
    one, _ = run(make(missing=CHOICES[choice]), faults=faults)
    np.testing.assert_allclose(one, flat(to_arrays(result.arrays)), atol=1e-6)


# ---- who is missing, and for how long --------------------------------------------------------------


def test_rounds_say_who_was_missing_and_who_stood_in(tmp_path, caplog):
    goals = [goal for goal in targets(3) for _ in range(2)][:NUM]  # 0 and 1 alike, 2 and 3
    lost = (Event(4, "1", lost=True), Event(6, "2", lost=True), Event(6, "4", lost=True))
    apps = clients(goals, examples=(10,) * NUM)
    run(Plain(missing=Missing(own=False), **OPTIONS), apps, 6, Faults(events=lost), to=tmp_path)
    rows = {row["round"]: row for row in read_rounds(tmp_path / "rounds.jsonl")}
    assert "missing-clients" not in rows[3]
    assert (rows[4]["missing-clients"], rows[4]["stand-ins"]) == (["1"], {"1": "0"})
    assert rows[6]["missing-clients"] == ["2", "4"]
    assert rows[6]["stand-ins"]["2"] == "3"
    assert "round 4 is without client 1 (0 stands in)." in caplog.text


def test_a_round_below_the_quorum_says_who_was_missing(tmp_path):
    run(Plain(**OPTIONS), rounds=3, faults=Faults(drop=1.0, start_round=3), to=tmp_path)
    assert read_rounds(tmp_path / "rounds.jsonl")[3]["missing-clients"] == [str(i) for i in range(NUM)]


class Offline(GridWrapper):
    """Lets a node vanish between rounds, as one that was killed does: it is not there to be asked."""

    def __init__(self, inner, node_id, since):
        super().__init__(inner)
        self.node_id, self.since, self.asked = node_id, since, 0

    def get_node_ids(self):
        return [n for n in self.inner.get_node_ids() if n != self.node_id or self.asked < self.since]

    def push_messages(self, messages):
        messages = list(messages)
        self.asked += bool(messages)
        return self.inner.push_messages(messages)


@pytest.mark.parametrize("patience", [None, 2])
def test_a_client_that_cannot_be_asked_is_stood_in_for(patience, tmp_path):
    grid = RoundGrid(Offline(InProcessGrid(clients()), 1001, since=3))
    options = OPTIONS | {"min_train_nodes": 2, "min_available_nodes": 2}
    strategy = Plain(missing=Missing("mifa", patience=patience), **options)
    strategy.start(grid, initial(), num_rounds=6, evaluate_fn=grid.ledger.recording(None, to=tmp_path))
    rows = read_rounds(tmp_path / "rounds.jsonl")
    assert [row.get("missing-clients", []) for row in rows] == [[]] * 4 + [["1"]] * 3
    stood_in = [row.get("stand-ins", {}) for row in rows[4:]]
    assert stood_in == [{"1": "1"}] * (patience or 3) + [{}] * (3 - (patience or 3))


def test_of_a_sample_only_who_was_asked_is_missing():
    options = OPTIONS | {"min_train_nodes": 2, "fraction_train": 0.4}
    _, result = run(Plain(missing="mifa", **options), rounds=8)
    assert all(record["surrogates"] == 0 for record in result.train_metrics_clientapp.values())


def test_an_answer_ends_an_interval_and_so_does_long_silence():
    known = Known().answered(3.0, "", masked=False)
    assert (known.interval, known.silent, known.weight) == (1.0, 0, 3.0)
    for _ in range(4):
        known = known.missed()
    assert known.answered(3.0, "", masked=False).interval == np.mean([1, 5])
    for _ in range(CUTOFF - 4):
        known = known.missed()
    assert (known.silent, known.interval) == (CUTOFF, np.mean([1, CUTOFF]))


def test_reweighting_removes_the_bias_of_who_answers():
    """Client 0 answers in every fourth round: over many rounds it pulls as hard as the others."""
    events = tuple(Event(k, "0", lost=True) for k in range(1, 100) if k % 4)
    apps = [client_app([AquilaMod()], goal, rate=0.06) for goal in targets(NUM)]
    whole, _ = run(Plain(**OPTIONS), apps, 80)
    off = {
        by: np.linalg.norm(run(Plain(missing=by, **OPTIONS), apps, 80, Faults(events=events))[0] - whole)
        for by in ("drop", "reweight", "mifa")
    }
    assert off["reweight"] < 0.2 * off["drop"]
    assert off["mifa"] < 0.2 * off["drop"]


# ---- what it composes with -------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["reweight", "mifa", "safari"])
def test_what_was_stood_in_for_is_not_sent_later(by):
    """Error feedback sends later what was lost; where others stood in for it, that would count twice."""
    goals, faults = [targets(1)[0]] * NUM, Faults(events=(Event(4, "1", lost=True),))
    apps, half = clients(goals, (10,) * NUM), {"quantizer": None, "sparsifier": TopK(0.5)}
    whole, _ = run(ErrorFeedback(**OPTIONS, **half), apps, 8)
    ours, _ = run(ErrorFeedback(missing=Missing(by, own=False if by == "safari" else None), **OPTIONS, **half),
                  clients(goals, (10,) * NUM), 8, faults)  # fmt: skip
    if by == "safari":
        np.testing.assert_allclose(ours, whole, atol=1e-5)
    later, _ = run(ErrorFeedback(missing="drop", **OPTIONS, **half), clients(goals, (10,) * NUM), 8, faults)
    assert np.linalg.norm(ours - later) > 1e-3


@pytest.mark.parametrize("by", ["drop", "reweight", "mifa", "safari"])
def test_each_choice_goes_with_parts_of_the_model(by):
    options = {"submodels": {"r2": lora_rank(2)}, "missing": by, **OPTIONS}
    for make in (Plain, lambda **o: Safari(density=0.5, **o)):
        grid = InProcessGrid(clients())
        for context in list(grid.contexts.values())[::2]:
            context.node_config["submodel"] = "r2"
        result = make(**options).start(RoundGrid(grid, faults=Faults(drop=0.3)), initial(), num_rounds=8)
        assert np.isfinite(flat(to_arrays(result.arrays))).all()
        assert np.linalg.norm(flat(to_arrays(result.arrays))) > 1


REFUSED = [
    (lambda: Aquila(missing="safari"), "missing: expected 'mifa' with Aquila"),
    (lambda: Aquila(missing="drop"), "one that skips"),
    (lambda: Marina(missing="mifa"), "missing: not with Marina"),
    (lambda: Tac(num_clusters=2, missing="safari", skip=SkipRule.aquila(0.1)), "one that skips"),
    (lambda: Plain(lora="product", downlink=None, missing="mifa"), "next SVD"),
    (lambda: Plain(lora="product", downlink=None, missing="reweight"), "factor of the change"),
    (lambda: Plain(row_mask=RowMask(1), missing="mifa"), "rows that are inactive"),
    (lambda: Plain(row_mask=RowMask(1), missing=Missing(own=True)), "rows that are inactive"),
    (lambda: Plain(step_size=0.1, missing=Missing(surrogate="update")), "step_size"),
    (lambda: Plain(gap=True, missing="reweight"), "gap: not with"),
    (lambda: Plain(missing="nobody"), "missing: by: expected one of drop, reweight, mifa, safari"),
    (lambda: Missing(similarity="dot"), "similarity"),
    (lambda: Missing(surrogate="none"), "surrogate"),
    (lambda: Missing(similarity="l2", own=True), "own: only with"),
    (lambda: Missing(warmup_rounds=-1), "warmup_rounds"),
    (lambda: Missing(patience=0), "patience"),
]


@pytest.mark.parametrize(("make", "message"), REFUSED)
def test_what_cannot_be_is_refused_at_construction(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


def test_the_lazy_sum_counts_missing_clients_with_what_it_has_of_them():
    assert Aquila(missing="mifa").missing.by == "drop", "nothing is added to what it does anyway"


def test_products_of_factors_take_surrogates():
    strategy = Plain(lora="product", missing="safari", **OPTIONS)
    params, result = run(strategy, faults=Faults(drop=0.4))
    assert np.isfinite(params).all()
    assert sum(record["surrogates"] for record in result.train_metrics_clientapp.values()) > 0


# ---- what is remembered ----------------------------------------------------------------------------


def test_similarity_takes_scalars_and_nothing_of_the_models_size():
    """O(clients²): four times for twice the clients, whatever their arrays hold."""
    sizes = {}
    for num in (10, 20):
        strategy = Plain(missing=Missing(own=False), **OPTIONS)
        run(strategy, clients(targets(num), (10,) * num), rounds=3)
        state = strategy.state
        assert state.memory is None
        sizes[num] = state.similarity.sums.nbytes + state.similarity.counts.nbytes
    assert sizes == {10: 16 * 10**2, 20: 16 * 20**2}


def test_last_updates_take_one_file_per_client(tmp_path):
    strategy = Plain(missing="mifa", checkpoint=tmp_path, **OPTIONS)
    run(strategy, rounds=3)
    assert len(list((tmp_path / "memories").iterdir())) == NUM
    assert json.loads(json.dumps(strategy.remember()["aggregation"]["clients"]))["0"][0] == EXAMPLES[0]


def test_similarities_in_pieces_are_those_of_the_whole(monkeypatch):
    rng = np.random.default_rng(0)
    rows, kept = rng.normal(size=(4, 100)).astype(np.float32), rng.random((4, 100)) < 0.6
    rows *= kept
    monkeypatch.setattr("fedkit.aggregation.similarity._COLUMNS", 7)
    both = kept[0] & kept[1]
    a, b = rows[0][both], rows[1][both]
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    assert cosines(list(rows), list(kept))[0, 1] == pytest.approx(expected, rel=1e-5)
    assert distances(list(rows))[2, 3] == pytest.approx(-np.linalg.norm(rows[2] - rows[3]), rel=1e-5)
    assert np.isnan(cosines([rows[0] * kept[0], rows[1] * 0], [None, None])[0, 1])
