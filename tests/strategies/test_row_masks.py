"""Few rows of LoRA factors travel in a round; both sides draw the same, whatever is lost, late or resumed."""

import logging

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedkit.arrays import flatten, flatten_mask
from fedkit.clients import AquilaMod, ErrorFeedbackMod
from fedkit.codec.baselines import Qsgd, Sign
from fedkit.codec.entropy_constrained import EntropyConstrained
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.rotation import Eden
from fedkit.codec.sparsify import TopK
from fedkit.codec.wire import Codec, decode
from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.limits import Limits
from fedkit.memory import GENESIS, Residual
from fedkit.message import from_arrays, read_frame, read_instructions, read_report, rows_of, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.row_masks import ROWS_SEED, RowDraw, RowMask
from fedkit.state import ClientState
from fedkit.strategies import Aquila, ErrorFeedback, Marina, Plain, Safari, Tac
from fedkit.submodels import check, embed, lora_rank, owned, shapes, take, whole
from tests.helpers.grid import InProcessGrid, VirtualTime

NUM = 4
LIKE = {  # two layers and a head
    "1.lora_A": np.zeros((4, 12), np.float32),
    "1.lora_B": np.zeros((10, 4), np.float32),
    "2.lora_A": np.zeros((4, 6), np.float32),
    "2.lora_B": np.zeros((5, 4), np.float32),
    "head": np.zeros((3, 5), np.float32),
}
SIZE = sum(a.size for a in LIKE.values())
OPTIONS = {"fraction_evaluate": 0.0, "min_train_nodes": NUM, "min_available_nodes": NUM}
DENSE = OPTIONS | {"downlink": None}
RATE = np.float32(0.3)


def target(i):
    rng = np.random.default_rng(i)
    return {name: rng.normal(size=a.shape).astype(np.float32) for name, a in LIKE.items()}


def client(mods, goal, num_examples, obeys=True):
    """A step towards its own target, in the rows that it is asked for."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message, context):
        (record,) = message.content.array_records.values()
        local, rows = to_arrays(record), rows_of(message)
        part = whole(local) if rows is None or not obeys else rows.submodel(local)
        for name, sets in part.index_sets.items():
            place = np.ix_(*sets)
            local[name][place] += RATE * (goal[name][place] - local[name][place])
        metrics = MetricRecord({"num-examples": num_examples})
        return Message(RecordDict({"arrays": from_arrays(local), "metrics": metrics}), reply_to=message)

    return app


def federation(mod=AquilaMod, spies=(), held=("",) * NUM, cuts=None, obeys=True, inner=()):
    cuts = {"": whole, **(cuts or {})}
    grid = InProcessGrid(
        [client([*spies, mod(), *inner], take(target(i), cuts[n](LIKE)), 3 + i, obeys) for i, n in enumerate(held)]
    )
    for context, name in zip(grid.contexts.values(), held, strict=True):
        if name:
            context.node_config["submodel"] = name
    return grid


def run(strategy, grid, rounds=6, faults=None):
    wrapped = RoundGrid(grid, faults=faults)
    return to_arrays(strategy.start(wrapped, from_arrays(LIKE), num_rounds=rounds).arrays), wrapped


def spy_on(seen):
    def spy(message, context, call_next):
        told = read_instructions(message)
        reply = call_next(message, context)
        if not told.introduce and reply.has_content():
            ((record,),) = [r.values() for r in reply.content.array_records.values()]
            seen.append((told.server_round, context.node_id - 1000, rows_of(message), len(record.data)))
        return reply

    return spy


def test_draws_are_uniform_distinct_and_the_same_for_ever():
    counts = np.zeros(8)
    for seed in range(400):
        rows = RowDraw(3, seed).rows("x.lora_A.weight", 8)
        assert len(set(rows.tolist())) == 3
        assert sorted(rows.tolist()) == rows.tolist()
        counts[rows] += 1
    assert (abs(counts - 150) < 45).all()  # 4.6 standard deviations
    assert RowDraw(3, 1).rows("x.lora_A.weight", 8).tolist() == [0, 1, 4]  # no release may change this
    assert RowMask(2).draw(0, 1).seed == 9221934688551543782


def test_columns_of_b_are_those_of_a_or_their_own():
    paired, own = RowDraw(2, 5), RowDraw(2, 5, "independent")
    names = [f"{i}.lora_A" for i in range(20)]
    assert all((paired.rows(n, 8) == paired.rows(n.replace("A", "B"), 8)).all() for n in names)
    assert not all((own.rows(n, 8) == own.rows(n.replace("A", "B"), 8)).all() for n in names)
    assert len({tuple(paired.rows(n, 8).tolist()) for n in names}) > 5  # each layer its own


def test_options_and_text_bring_a_draw_back():
    draw = RowDraw(2, 2**63 - 1, "independent")
    assert RowDraw.from_options(draw.to_options()) == RowDraw.from_str(str(draw)) == draw
    assert RowDraw.from_options({}) is None
    with pytest.raises(ConfigError, match="incomplete"):
        RowDraw.from_options({ROWS_SEED: 3})


@pytest.mark.parametrize("per", ["round", "client"])
@pytest.mark.parametrize("pairing", ["paired", "independent"])
@pytest.mark.parametrize(("make", "mod"), [(Plain, AquilaMod), (ErrorFeedback, ErrorFeedbackMod)])
def test_the_mean_over_senders_agrees_with_a_loop_over_entries(make, mod, per, pairing):
    mask = RowMask(2, per, pairing)
    ours, _ = run(make(quantizer=None, row_mask=mask, seed=3, **DENSE), federation(mod))
    theta, goals = np.zeros(SIZE), [flatten(target(i)) for i in range(NUM)]
    for server_round in range(1, 7):
        step = np.zeros(SIZE)
        draws = [mask.draw(3, server_round, *([str(i)] if per == "client" else [])) for i in range(NUM)]
        sent = [flatten_mask(owned(draw.submodel(LIKE), like=LIKE)) for draw in draws]
        for entry in range(SIZE):
            total = value = 0.0
            for i in range(NUM):
                if sent[i][entry]:
                    total += 3 + i
                    value += (3 + i) * 0.3 * (goals[i][entry] - theta[entry])
            step[entry] = value / total if total else 0.0  # what nobody sent stays
        theta += step
    np.testing.assert_allclose(flatten(ours), theta, rtol=1e-4, atol=1e-5)


def test_all_rows_active_changes_nothing():
    ours, _ = run(Plain(row_mask=RowMask(4), **OPTIONS), federation())
    plain, _ = run(Plain(**OPTIONS), federation())
    assert all(ours[name].tobytes() == plain[name].tobytes() for name in plain)


@pytest.mark.parametrize("active", [1, 2, 4])
def test_the_bytes_of_an_upload_fall_by_the_share_of_active_rows(active):
    seen = []
    run(Plain(row_mask=RowMask(active), **DENSE), federation(spies=[spy_on(seen)]), 3)
    factors, head = sum(a.size for n, a in LIKE.items() if "lora" in n), LIKE["head"].size
    bare = len(Codec().encode({"x": np.zeros(0, np.float32)}))
    assert len(seen) == 3 * NUM
    for *_, draw, size in seen:
        assert draw.active_rank == active
        assert abs(size - bare - 4 * (factors * active // 4 + head)) <= 8


@pytest.mark.parametrize(
    "codec",
    [
        {"quantizer": Qsgd(8)},
        {"quantizer": ZeroMidTread()},
        {"quantizer": EntropyConstrained(4.0)},
        {"quantizer": Eden(2)},
        {"quantizer": Sign()},
        {"quantizer": None, "sparsifier": TopK(0.5)},
        {"quantizer": ZeroMidTread(), "downlink": Codec(EntropyConstrained(4.0))},
    ],
    ids=str,
)
def test_with_every_codec_and_losses_the_optimum_is_near_and_nothing_is_refused(codec):
    strategy = ErrorFeedback(row_mask=RowMask(2), **{**DENSE, **codec})
    ours, wrapped = run(strategy, federation(ErrorFeedbackMod), 40, Faults(drop=0.3, seed=1))
    mean = np.average([flatten(target(i)) for i in range(NUM)], axis=0, weights=[3 + i for i in range(NUM)])
    assert sum(wrapped.ledger.round_totals(k)["rejected"] for k in range(1, 41)) == 0
    assert np.linalg.norm(flatten(ours) - mean) < 0.75 * np.linalg.norm(mean)


@pytest.mark.parametrize("per", ["round", "client"])
def test_what_error_feedback_keeps_is_what_was_not_sent_in_the_rows_of_then(per):
    """Sum of all updates = sum of what arrived + what is kept, whatever is lost, and whichever rows."""
    trained, arrived = np.zeros((NUM, SIZE)), np.zeros((NUM, SIZE))

    def inner(message, context, call_next):
        before = flatten(to_arrays(next(iter(message.content.array_records.values()))))
        reply = call_next(message, context)
        after = flatten(to_arrays(next(iter(reply.content.array_records.values()))))
        trained[context.node_id - 1000] += after - before
        return reply

    class Watched(ErrorFeedback):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            for reply in (reply for reply in replies if reply.has_content()):
                part = self.parts.rows.said(read_report(reply.content)).submodel(LIKE)
                arrays = decode(read_frame(reply.content), like=shapes(part, like=LIKE))
                arrived[reply.metadata.src_node_id - 1000] += flatten(embed(arrays, part, like=LIKE))
            return super().aggregate_train(server_round, replies)

    grid = federation(ErrorFeedbackMod, inner=[inner])
    strategy = Watched(row_mask=RowMask(2, per), quantizer=ZeroMidTread(2, 2), **DENSE)
    run(strategy, grid, 25, Faults(drop=0.3, seed=2))
    for i, context in enumerate(grid.contexts.values()):
        state = dict(ClientState(context, strategy.progress.experiment).load())
        accepted = strategy.registry.accepted.get(str(i), GENESIS)
        kept = Residual(state, "error-feedback", like=LIKE).settle(accepted)
        np.testing.assert_allclose(arrived[i] + flatten(kept), trained[i], rtol=1e-3, atol=1e-4)


def test_mixed_ranks_draw_from_their_own_rows():
    cuts = {"r2": lora_rank(2), "r3": lora_rank(3, lora_alpha=3, server_lora_alpha=8)}
    held, seen = ["r2", "r3", "", "r2"], []
    strategy = Plain(row_mask=RowMask(2), submodels=cuts, **DENSE)
    ours, wrapped = run(strategy, federation(spies=[spy_on(seen)], held=held, cuts=cuts), 30)
    alone, _ = run(Plain(submodels=cuts, **DENSE), federation(held=held, cuts=cuts), 30)
    assert sum(wrapped.ledger.round_totals(k)["rejected"] for k in range(1, 31)) == 0
    np.testing.assert_allclose(ours["1.lora_A"][:2], alone["1.lora_A"][:2], atol=0.7)
    for _, i, draw, size in seen:
        part = take(LIKE, {"": whole, **cuts}[held[i]](LIKE))
        check(draw.submodel(part), like=part)
        assert size == len(Codec().encode(take(part, draw.submodel(part))))


@pytest.mark.parametrize("lora", ["fedsa", "product"])
def test_it_goes_with_what_lora_clients_share(lora):
    params, wrapped = run(Plain(row_mask=RowMask(1), lora=lora, **DENSE), federation(), 6)
    assert sum(wrapped.ledger.round_totals(k)["rejected"] for k in range(1, 7)) == 0
    assert params["1.lora_A"].any()
    assert params["1.lora_B"].any() == (lora == "product")


def test_a_late_reply_is_read_with_the_rows_that_it_was_asked_for():
    """Every client's goal is the same: a row that was put in another's place would be far off."""
    seen, per_round = [], []

    class Watched(Plain):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            per_round.append([r.metadata.src_node_id - 1000 for r in replies if r.has_content()])
            return super().aggregate_train(server_round, replies)

    grid = InProcessGrid([client([spy_on(seen), AquilaMod()], target(0), 1) for _ in range(NUM)])
    faults = Faults(late=0.5, mean_delay=30.0, seed=1)
    limits = Limits(quorum=0.25, grace=1.0, deadline=20.0)
    clock = VirtualTime()
    options = {**DENSE, "min_available_nodes": 1, "min_train_nodes": 1}
    strategy = Watched(row_mask=RowMask(1), limits=limits, **options)
    wrapped = RoundGrid(grid, faults=faults, clock=clock)
    params = to_arrays(strategy.start(wrapped, from_arrays(LIKE), num_rounds=40).arrays)
    late = sum(
        i in round_ and (k, i) not in {(r, c) for r, c, *_ in seen}
        for k, round_ in enumerate(per_round, start=1)
        for i in round_
    )
    assert late > 3
    assert sum(wrapped.ledger.round_totals(k)["rejected"] for k in range(1, 41)) == 0
    np.testing.assert_allclose(flatten(params), flatten(target(0)), atol=0.9)


@pytest.mark.parametrize("per", ["round", "client"])
def test_a_resumed_run_draws_what_it_would_have_drawn(tmp_path, monkeypatch, per):
    monkeypatch.setenv("FEDKIT_STATE_DIR", str(tmp_path / "clients"))

    def resumed(folder, *stops):
        for stop in stops:
            options = {"row_mask": RowMask(2, per), "checkpoint": tmp_path / folder} | DENSE
            params, _ = run(ErrorFeedback(quantizer=ZeroMidTread(), **options), federation(ErrorFeedbackMod), stop)
        return params

    once, twice = resumed("once", 7), resumed("twice", 3, 7)
    assert all(once[name].tobytes() == twice[name].tobytes() for name in once)
    with pytest.raises(ConfigError, match="expected parts None"):
        run(
            ErrorFeedback(quantizer=ZeroMidTread(), checkpoint=tmp_path / "once", **DENSE),
            federation(ErrorFeedbackMod),
            8,
        )


def test_an_app_that_trains_what_rests_is_told_so(caplog):
    with caplog.at_level(logging.WARNING, logger="fedkit"):
        run(Plain(row_mask=RowMask(2), **DENSE), federation(obeys=False), 1)
    assert "was trained in components that rest in this round" in caplog.text


def test_an_upload_of_other_rows_is_refused(caplog):
    def liar(message, context, call_next):
        reply = call_next(message, context)
        if context.node_id == 1000:
            reply.content["fedkit"][f"fedkit-option-{ROWS_SEED}"] = 5
        if context.node_id == 1001:
            del reply.content["fedkit"][f"fedkit-option-{ROWS_SEED}"]
        return reply

    with caplog.at_level(logging.WARNING, logger="fedkit"):
        _, wrapped = run(Plain(row_mask=RowMask(2), **DENSE), federation(spies=[liar]), 1)
    assert wrapped.ledger.round_totals(1)["rejected"] == 2
    assert caplog.text.count("of other rows than it was asked for") == 2


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda **o: Aquila(**o), "row_mask: not with Aquila: the step is along"),
        (lambda **o: Marina(**o), "row_mask: not with Marina"),
        (lambda **o: Safari(sparse_model=True, **o), "sparse_model: a model's entries that rest"),
        (lambda **o: Tac(num_clusters=2, **o), "row_mask: not with Tac"),
    ],
)
def test_what_does_not_compose_is_refused_with_the_reason(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make(row_mask=RowMask(2))


@pytest.mark.parametrize("values", [{"active_rank": 0}, {"per": "step"}, {"pairing": "v1"}])
def test_values_that_can_never_work_are_refused(values):
    with pytest.raises(ConfigError, match=next(iter(values))):
        RowMask(**{"active_rank": 2, **values})


def test_rows_of_a_model_without_lora_factors_are_refused_before_training():
    strategy = Plain(row_mask=RowMask(active_rank=2))
    arrays = from_arrays({"w": np.zeros((3, 4), np.float32)})
    with pytest.raises(ConfigError, match="row_mask needs LoRA factors, got"):
        strategy.start(InProcessGrid([]), arrays, num_rounds=1)
