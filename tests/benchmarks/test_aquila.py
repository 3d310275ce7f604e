"""The AQUILA benchmark: its gradients, its runs, and what it says of them."""

import json

import numpy as np
import pytest

from benchmarks import aquila, gradient_tasks
from benchmarks.aquila_claims import ALL, BATCHES, FEDAVG, LAQ, LITERAL, QSGD, ZERO, claims, saving
from benchmarks.federate import arrival, run
from fedkit.arrays import num_values
from fedkit.strategies import Aquila


def loss(params, x, y):
    logits = gradient_tasks.mlp_output(params, x)[1]
    return float(np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(y)), y]))


def test_the_gradient_is_that_of_the_loss():
    rng = np.random.default_rng(0)
    params = {name: array.astype(np.float64) for name, array in gradient_tasks.mlp(rng).items()}
    x, y = rng.normal(size=(7, 64)), rng.integers(0, 10, 7)
    value, gradient = gradient_tasks.mlp_gradient(params, x, y)
    assert value == pytest.approx(loss(params, x, y))
    for name, array in params.items():
        direction = rng.normal(size=array.shape)
        up, down = (loss(params | {name: array + step * direction}, x, y) for step in (1e-5, -1e-5))
        assert (up - down) / 2e-5 == pytest.approx(float((gradient[name] * direction).sum()), rel=1e-5)


def test_the_models_have_the_sizes_that_are_stated():
    assert num_values(gradient_tasks.mlp(np.random.default_rng(0))) == 4_810
    assert num_values(gradient_tasks.cnn(0)) == 89_834


def test_a_client_of_the_digits_has_few_classes_and_the_same_number_of_rows():
    federation = gradient_tasks.digits(0, batch=None)
    assert federation.num_clients == 10
    local, metrics = federation.train(federation.initial, 3, 1)
    assert metrics["num-examples"] == 1
    assert local.keys() == federation.initial.keys()


def test_the_cnn_takes_its_widths_from_its_arrays():
    torch = pytest.importorskip("torch")
    half = {}
    for name, array in gradient_tasks.cnn(0).items():
        keep = [n if n in (3, 10) else n // 2 for n in array.shape[:2]]
        half[name] = torch.from_numpy(array[tuple(slice(n) for n in keep)])
    assert gradient_tasks.cnn_output(half, torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def test_arrival_is_of_the_mean_of_three():
    assert arrival([0.2, 0.9, 0.1, 0.7, 0.7, 0.7], 0.7) == 6
    assert arrival([0.2, 0.9], 0.5) is None


def test_uploads_are_counted_as_they_travel_and_as_papers_do():
    federation = gradient_tasks.digits(0, batch=32)
    row = run(federation, lambda **options: Aquila.published(beta=0.0, **options), 4, every=2)
    assert row["uploads"] == row["asked"] == 40
    assert [len(row[key]) for key in ("accuracy", "uplink", "uplink-frame", "downlink", "published")] == [2] * 5
    bits, rest = divmod(8 * row["published"][-1], 4_810)  # whole bits per parameter, and 40 for each upload
    assert bits >= 40
    assert rest == pytest.approx(40 * 40, abs=8)
    assert row["uplink-frame"][-1] < row["uplink"][-1]


def test_a_run_ends_where_it_arrives():
    federation = gradient_tasks.digits(0, batch=32)
    row = run(federation, aquila.arms(0.5)[FEDAVG], 9, target=0.0)
    assert len(row["accuracy"]) == 3


def line(name, final, mb):
    return {"arm": name, "final": final} | dict.fromkeys(("total", "total-paper", "up", "up-paper"), mb)


def test_a_claim_holds_at_the_accuracy_of_fedavg_only():
    good = {name: line(name, 0.96, mb) for name, mb in {FEDAVG: 99.0, QSGD: 10.0, LAQ: 5.0, ZERO: 1.0}.items()}
    bad = good | {ZERO: line(ZERO, 0.95, 1.0)}
    verdicts = [[row["paper-holds"] for row in claims({ALL: lines})] for lines in (good, bad)]
    assert verdicts == [["yes", "yes", "no"], ["no", "no", "no"]]
    assert saving(good[ZERO], good, "up") == pytest.approx(100 * (0.9 + 0.8) / 2)


def test_the_small_form_from_end_to_end(tmp_path, monkeypatch):
    table = aquila.arms(0.5)
    monkeypatch.setattr(
        aquila, "arms", lambda _, two_sizes=False: {name: table[name] for name in (FEDAVG, LITERAL, ZERO)}
    )
    options = ["--out", str(tmp_path), "--rounds", "3", "--json", str(tmp_path / "rows.json")]
    aquila.main(options)
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {(row["task"], row["arm"]) for row in rows} == {
        (task, arm) for task in (ALL, BATCHES) for arm in (FEDAVG, LITERAL, ZERO)
    }
    assert {"accuracy", "uplink", "downlink", "published", "commit", "machine"} <= rows[0].keys()


@pytest.mark.slow
def test_a_grid_with_a_zero_reproduces_what_is_claimed_of_it():
    lines, task = {}, aquila.TASKS["digits"][ALL]
    for name in (FEDAVG, QSGD, LAQ, ZERO):
        row = aquila.measure(task, aquila.arms(task.beta)[name], seed=0, num_rounds=200, target=None)
        lines[name] = aquila.compare(name, [row], [0.94])
    bounds = [row for row in claims({ALL: lines}) if "bound" in row and "/" in row["claim"]]
    assert [row["paper-holds"] for row in bounds] == ["yes", "yes"]
