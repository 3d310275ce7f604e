"""SAFARI against plain FedAvg and against an obvious twin; its masks and its surrogates."""

import numpy as np
import pytest
from flwr.serverapp.strategy import FedAvg

from fedkit.clients import SafariMod
from fedkit.codec.quantize import ZeroMidTread
from fedkit.codec.wire import open_frame
from fedkit.errors import ConfigError
from fedkit.faults import Faults
from fedkit.flower import GridWrapper
from fedkit.message import read_frame, to_arrays
from fedkit.rounds import RoundGrid
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


@pytest.mark.parametrize("published", [False, True])
def test_agrees_with_an_obvious_twin(published):
    """The server's rules written down once more, from what arrived, client by client and entry by entry."""
    make = Safari.published if published else Safari
    spies, faults, rounds = [], Faults(drop=0.4, seed=3), 8
    ours, _ = run(
        make(density=0.4, **DENSE), clients(), rounds, faults, lambda g: spies.append(Spy(g)) or spies[0]
    )
    theta, scores, seen, warmup = np.zeros(88), {}, set(), 0 if published else 2
    for k, replies in enumerate(spies[0].rounds, start=1):
        arrived = {n: (flat(u), flat(m)) for n, (u, m) in replies.items() if not faults.loses(k, str(n - 1000))}
        models = {n: np.where(m, theta + u, 0) if published else u for n, (u, m) in arrived.items()}
        for i in arrived:
            for j in arrived:
                both = arrived[i][1] & arrived[j][1]
                if published:
                    scores[i, j] = [-np.linalg.norm(models[i] - models[j])]
                elif both.any():
                    a, b = models[i][both], models[j][both]
                    scores.setdefault((i, j), []).append(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
        known = seen if k > 1 else set()
        stand_ins = list(arrived)
        if k > warmup:
            for i in sorted(known - set(arrived)):
                candidates = [j for j in sorted(arrived) if (i, j) in scores]
                if candidates:
                    stand_ins.append(max(candidates, key=lambda j: np.mean(scores[i, j])))
        if published:
            theta = np.mean([models[n] for n in stand_ins], axis=0)
        else:
            total = sum(arrived[n][0] * arrived[n][1] for n in stand_ins)
            owners = sum(arrived[n][1].astype(int) for n in stand_ins)
            theta = theta + np.divide(total, owners, out=np.zeros(88), where=owners > 0)
        seen |= set(arrived)
    np.testing.assert_allclose(flat(ours), theta, rtol=1e-4, atol=1e-5)


def test_a_surrogate_of_an_identical_client_is_the_missing_update():
    goals = [target for target in targets(3) for _ in range(2)]  # clients 0 and 1 alike, 2 and 3, 4 and 5
    faults = Faults(rates={"1": 1.0}, start_round=4)
    whole, _ = run(Safari(density=1.0, **DENSE), clients(goals), rounds=6)
    compensated, result = run(Safari(density=1.0, **DENSE), clients(goals), rounds=6, faults=faults)
    dropped, _ = run(Safari(density=1.0, compensate=False, **DENSE), clients(goals), rounds=6, faults=faults)
    np.testing.assert_allclose(flat(compensated), flat(whole), atol=1e-5)
    assert not np.allclose(flat(dropped), flat(whole), atol=1e-2)
    assert [result.train_metrics_clientapp[k]["surrogates"] for k in (3, 4, 6)] == [0, 1, 1]


def test_nobody_answering_keeps_the_model():
    params, result = run(Safari(**DENSE), clients(), rounds=4, faults=Faults(drop=1.0, start_round=3))
    after_two, _ = run(Safari(**DENSE), clients(), rounds=2)
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


def test_similarity_is_quadratic_in_clients_and_nothing_else():
    strategy = Safari(**DENSE)
    run(strategy, clients(), rounds=3)
    assert strategy.state.similarity.sums.shape == (NUM, NUM)
    assert set(strategy.state.weights) == {str(i) for i in range(NUM)}


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.5}, {"rewire": 2.0}, {"similarity": "dot"}])
def test_impossible_options_are_refused_at_construction(options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        Safari(**options)
