"""SAFARI against plain FedAvg, its masks and its surrogates; by value: `test_missing`."""

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from fedkit.aggregation.missing import Missing
from fedkit.clients import SafariMod
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.wire import open_frame
from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.flower import GridWrapper
from fedkit.message import from_arrays, read_frame, rows_of, to_arrays
from fedkit.rounds import RoundGrid
from fedkit.row_masks import RowMask
from fedkit.strategies import Safari
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import LIKE, client_app, initial, optimum, targets

NUM = 6
EVERYBODY = {"fraction_evaluate": 0.0, "min_train_nodes": NUM, "min_available_nodes": NUM}
DENSE = EVERYBODY | {"downlink": None}  # what is compared bit by bit


def clients(goals=None, examples=(10,) * NUM):
    return [
        client_app([SafariMod()], target, num_examples=n)
        for n, target in zip(examples, goals or targets(NUM), strict=True)
    ]


def run(strategy, apps, rounds=10, faults=None, spy=None):
    grid = InProcessGrid(apps)
    result = strategy.start(RoundGrid(spy(grid) if spy else grid, faults=faults), initial(), num_rounds=rounds)
    return to_arrays(result.arrays), result


def flat(arrays):
    return np.concatenate([a.ravel() for a in arrays.values()])


class Spy(GridWrapper):
    """Keeps what arrived: per round, the update and mask of each node."""

    def __init__(self, inner):
        super().__init__(inner)
        self.rounds = []

    def pull_messages(self, message_ids):
        replies = list(self.inner.pull_messages(message_ids))
        if replies:
            frames = {r.metadata.src_node_id: open_frame(read_frame(r.content), like=LIKE) for r in replies}
            self.rounds.append({node_id: (frame.arrays(), frame.mask) for node_id, frame in frames.items()})
        return replies


def masked_fedavg(spy):
    """Return the model that what arrived comes to: of each entry the mean over those that sent it."""
    theta = np.zeros(88)
    for replies in spy.rounds:
        sent = [(flat(update), flat(mask)) for update, mask in replies.values()]
        owners = sum(mask.astype(int) for _, mask in sent)
        theta += np.divide(sum(u for u, _ in sent), owners, out=np.zeros(88), where=owners > 0)
    return theta


@pytest.mark.parametrize(
    ("make", "examples"),
    [(Safari, (1, 5, 9, 20, 3, 7)), (Safari.published, (10,) * NUM)],
    ids=["default", "published"],
)
def test_nobody_missing_and_density_one_is_fedavg(make, examples):
    ours, _ = run(make(density=1.0, **DENSE), clients(examples=examples))
    theirs, _ = run(FedAvg(**EVERYBODY), clients(examples=examples))
    np.testing.assert_allclose(flat(ours), flat(theirs), atol=1e-5)


def test_permuting_clients_changes_nothing():
    faults = Faults(drop=0.4)
    renamed = InProcessGrid(clients()[::-1])
    for i, context in enumerate(renamed.contexts.values()):
        context.node_config["client-id"] = str(NUM - 1 - i)
    one, _ = run(Safari(density=0.3, **DENSE), clients(), faults=faults)
    result = Safari(density=0.3, **DENSE).start(RoundGrid(renamed, faults=faults), initial(), num_rounds=10)
    np.testing.assert_allclose(flat(one), flat(to_arrays(result.arrays)), atol=1e-6)


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_a_frame_keeps_the_density_and_the_mask_moves(density):
    spies = []
    run(Safari(density=density, **DENSE), clients(), rounds=3, spy=lambda g: spies.append(Spy(g)) or spies[0])
    first, second = (rounds[1000][1] for rounds in spies[0].rounds[:2])
    if density == 1.0:
        assert first is None
        return
    for name, array in LIKE.items():
        assert first[name].sum() == second[name].sum() == max(1, round(density * array.size))
    assert any((first[name] != second[name]).any() for name in LIKE)
    masks = [mask for _, mask in spies[0].rounds[0].values()]
    assert any((masks[0][name] != masks[1][name]).any() for name in LIKE), "each client has its own"


def test_a_surrogate_of_an_identical_client_is_the_missing_update():
    goals = [target for target in targets(3) for _ in range(2)]  # clients 0 and 1 alike, 2 and 3, 4 and 5
    faults, kin = Faults(rates={"1": 1.0}, start_round=4), Missing(own=False)
    whole, _ = run(Safari(density=1.0, **DENSE), clients(goals), rounds=6)
    compensated, result = run(Safari(density=1.0, missing=kin, **DENSE), clients(goals), rounds=6, faults=faults)
    dropped, _ = run(Safari(density=1.0, missing="drop", **DENSE), clients(goals), rounds=6, faults=faults)
    np.testing.assert_allclose(flat(compensated), flat(whole), atol=1e-5)
    assert not np.allclose(flat(dropped), flat(whole), atol=1e-2)
    assert [result.train_metrics_clientapp[k]["surrogates"] for k in (3, 4, 6)] == [0, 1, 1]


def test_nobody_missing_is_masked_fedavg():
    """Of each entry the mean over those that keep it, from what they sent."""
    spies = []
    ours, _ = run(Safari(density=0.3, **DENSE), clients(), spy=lambda g: spies.append(Spy(g)) or spies[0])
    np.testing.assert_allclose(flat(ours), masked_fedavg(spies[0]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lossy", [False, True])
def test_masks_that_are_drawn_are_masked_fedavg_and_leave_nothing_behind(lossy):
    """Of each entry the mean over those that drew it; other entries in each round and of each client; no state."""
    grid, faults = Spy(InProcessGrid(clients())), Faults(drop=0.3, seed=3) if lossy else None
    strategy = Safari(density=0.25, masks="drawn", missing="drop", **DENSE)
    result = strategy.start(RoundGrid(grid, faults=faults), initial(), num_rounds=8)
    if not lossy:
        np.testing.assert_allclose(flat(to_arrays(result.arrays)), masked_fedavg(grid), rtol=1e-4, atol=1e-5)
    masks = [flat(mask) for replies in grid.rounds for _, mask in replies.values()]
    assert {int(mask.sum()) for mask in masks} == {12 + 10}  # a quarter of 48 and of 40 entries
    assert len({mask.tobytes() for mask in masks}) == len(masks)
    states = [context.state for context in grid.inner.contexts.values()]
    assert not any(b"safari" in str(state).encode() for state in states)


def test_masks_that_are_drawn_take_no_bytes():
    sizes = {}
    for masks in ("own", "drawn"):
        grid = RoundGrid(InProcessGrid(clients()))
        Safari(density=0.25, masks=masks, **DENSE).start(grid, initial(), num_rounds=1)
        sizes[masks] = grid.ledger.round_totals(1)["uplink-frame-bytes"] / NUM
    assert sizes["drawn"] == 25 + 16 + 4 * 22
    assert sizes["own"] == 25 + 11 + 4 * 22  # a bitmap of 88 entries: of large arrays the seed is less


@pytest.mark.parametrize("per", ["round", "client"])
def test_masks_that_are_drawn_are_of_the_rows_that_travel(per):
    apps = [rows_app(target) for target in targets(NUM)]
    strategy = Safari(density=0.5, masks="drawn", missing="drop", row_mask=RowMask(2, per=per), **DENSE)
    params, _ = run(strategy, apps, 16, Faults(drop=0.3))
    closer = 0.9 if per == "round" else 0.97  # means over fewer clients, which scatter
    assert np.linalg.norm(flat(params) - optimum(NUM)) < closer * np.linalg.norm(optimum(NUM))


@pytest.mark.parametrize("per", ["round", "client"])
def test_masks_are_of_the_rows_that_travel(per):
    """With a row mask a frame holds, of the active rows, the entries that the client keeps."""
    seen, missing = [], Missing(warmup_rounds=0)

    class Frames(GridWrapper):
        def pull_messages(self, message_ids):
            replies = list(self.inner.pull_messages(message_ids))
            like = {"lora_A": LIKE["lora_A"][:2], "lora_B": LIKE["lora_B"][:, :2]}
            frames = [read_frame(r.content) for r in replies if r.content.array_records]  # not who is who
            seen.extend(open_frame(frame, like=like).mask for frame in frames)
            return replies

    apps = [rows_app(target) for target in targets(NUM)]
    strategy = Safari(density=0.5, rewire=1, row_mask=RowMask(2, per=per), missing=missing, **DENSE)
    params, result = run(strategy, apps, 16, Faults(drop=0.3), spy=Frames)
    shares = [sum(m.sum() for m in mask.values()) / 44 for mask in seen]
    assert 0.3 < min(shares) <= max(shares) < 0.7
    assert any((seen[0][name] != seen[NUM][name]).any() for name in LIKE), "masks move"
    assert np.linalg.norm(flat(params) - optimum(NUM)) < 0.9 * np.linalg.norm(optimum(NUM))
    assert sum(m["surrogates"] for m in result.train_metrics_clientapp.values()) > 10


@pytest.mark.parametrize("lora", ["ffa", "fedsa"])
def test_masks_are_of_the_factors_that_are_shared(lora):
    def frozen(local):
        return local if lora == "fedsa" else local | {"lora_A": np.ones((4, 12), np.float32)}

    start, mods = from_arrays(LIKE | {"lora_A": np.ones((4, 12), np.float32)}), [SafariMod()]
    apps = [client_app(mods, target, tamper=frozen) for target in targets(NUM)]
    strategy = Safari(density=0.5, lora=lora, **DENSE)
    result = strategy.start(RoundGrid(InProcessGrid(apps), faults=Faults(drop=0.3)), start, num_rounds=6)
    moved = {name for name, array in to_arrays(result.arrays).items() if (array != to_arrays(start)[name]).any()}
    assert moved == ({"lora_B"} if lora == "ffa" else {"lora_A"})


def rows_app(target):
    """A client that trains the rows that it is asked for, and no other."""
    app = ClientApp(mods=[SafariMod()])

    @app.train()
    def train(message, context):
        (record,) = message.content.array_records.values()
        received, rows = to_arrays(record), rows_of(message)
        local = {name: a.copy() for name, a in received.items()}
        for name, sets in rows.submodel(received).index_sets.items():
            at = np.ix_(*sets)
            local[name][at] += np.float32(0.3) * (target[name][at] - received[name][at])
        content = {"arrays": from_arrays(local), "metrics": MetricRecord({"num-examples": 10})}
        return Message(RecordDict(content), reply_to=message)

    return app


def test_nobody_answering_keeps_the_model():
    params, result = run(Safari(**DENSE), clients(), rounds=4, faults=Faults(drop=1.0, start_round=3))
    after_two, _ = run(Safari(**DENSE), clients(), rounds=2)
    np.testing.assert_array_equal(flat(params), flat(after_two))
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert params.keys() == after_two.keys()
    assert np.isfinite(flat(params)).all()


def test_a_client_never_heard_from_has_no_surrogate():
    _, result = run(Safari(**DENSE), clients(), rounds=5, faults=Faults(rates={"0": 1.0}))
    assert all(m["surrogates"] == 0 for m in result.train_metrics_clientapp.values())


def test_aquilas_quantizer_codes_the_kept_values():
    spies = []
    strategy = Safari(density=0.5, quantizer=ZeroMidTread(8, 8), **DENSE)
    params, _ = run(strategy, clients(), 30, spy=lambda g: spies.append(Spy(g)) or spies[0])
    assert np.linalg.norm(flat(params) - optimum(NUM)) < 0.7 * np.linalg.norm(optimum(NUM))
    update, mask = spies[0].rounds[0][1000]
    levels = update["lora_A"][mask["lora_A"]] / np.abs(update["lora_A"]).max() * 127
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)


REFUSED = [
    ({"density": 0.0}, "density"),
    ({"density": 1.5}, "density"),
    ({"rewire": 2.0}, "rewire"),
    ({"masks": "random"}, "masks: expected 'own' or 'drawn', got 'random'"),
    ({"masks": "drawn", "rewire": 0.05}, "masks='drawn': nobody keeps"),
    ({"masks": "drawn", "sparse_model": True}, "masks='drawn': nobody keeps"),
    ({"lora": "product", "downlink": None}, "product: not with Safari"),
    ({"sparse_model": True, "row_mask": RowMask(2)}, "sparse_model"),
    ({"row_mask": RowMask(2), "missing": "mifa"}, "missing: 'mifa': not with row_mask"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_impossible_options_are_refused_at_construction(options, message):
    with pytest.raises(ConfigError, match=message):
        Safari(**options)
