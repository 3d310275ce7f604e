"""The READMEs keep their word: commands are one line each, code runs, links lead somewhere."""

import re
import tomllib
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, MetricRecord, RecordDict

from fedkit.clients import AquilaMod, SafariMod
from fedkit.codec.wire import read_header
from fedkit.message import read_frame, to_arrays
from fedkit.plan import DRIVEN_KEYS
from fedkit.report import read_rounds
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import client_app, initial, optimum, targets

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("*/README.md")), *sorted(ROOT.glob("examples/*/README.md"))]
PAGES += sorted((ROOT / ".github").glob("*.md"))


def blocks(language, *pages):
    texts = [page.read_text() for page in pages or PAGES]
    return [
        found for text in texts for found in re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.DOTALL)
    ]


def anchors(page):
    heads = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            assert (page.parent / path).exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(page.parent / path if path else page), f"{page.name}: {target}"


def test_a_newcomer_reads_it_in_five_minutes():
    assert PAGES[0].read_text().count("\n") <= 180


def test_the_first_two_bash_blocks_are_one_line_each_and_set_up_themselves():
    run, test = blocks("bash", PAGES[0])[:2]
    assert run.count("\n") == test.count("\n") == 1
    assert "pip install" in run
    assert run.rstrip().endswith("fedkit run examples/quickstart")
    assert "pip install" in test
    assert test.rstrip().endswith("pytest -n auto")


def test_the_scheme_of_the_readme_learns_and_sends_a_tenth():
    (code,) = [block for block in blocks("python") if "class TopKMod" in block]
    names = {"__name__": "top_k"}
    exec(compile(code, "strategies/README.md", "exec"), names)
    sizes = []

    def measure(message, context, call_next):
        reply = call_next(message, context)
        sizes.append(read_header(read_frame(reply.content)).count)
        return reply

    grid = InProcessGrid([client_app([measure, names["TopKMod"]()], target) for target in targets(4)])
    strategy = names["TopK"](density=0.1, fraction_evaluate=0.0, min_train_nodes=4)
    result = strategy.start(grid, initial(), num_rounds=40)
    params = np.concatenate([a.ravel() for a in to_arrays(result.arrays).values()])
    assert np.linalg.norm(params - optimum(4)) < 0.7 * np.linalg.norm(optimum(4))
    assert max(sizes) <= 0.1 * 88 + 4


def test_the_server_of_the_readme_runs_what_the_run_config_names(tmp_path):
    (code,) = [block for block in blocks("python") if "class Config(RunConfig)" in block]
    names = {"__name__": "server_app", "initial_arrays": initial}
    names["evaluate"] = lambda server_round, arrays: MetricRecord({"accuracy": 0.5})
    exec(compile(code, "strategies/README.md", "exec"), names)
    (text,) = [block for block in blocks("toml") if "flwr.app.config" in block]
    defaults = tomllib.loads(text)["tool"]["flwr"]["app"]["config"]
    assert set(list(defaults)[:5]) == set(DRIVEN_KEYS)
    config = defaults | {"strategy": "safari", "num-rounds": 3, "num-clients": 4, "run-dir": str(tmp_path)}
    grid = InProcessGrid([client_app([AquilaMod(), SafariMod()], target) for target in targets(4)])
    names["app"](grid, Context(1, 1, {}, RecordDict(), config | {"drop": 0.5, "learning-rate": 0.1}))
    rows = read_rounds(tmp_path / "rounds.jsonl")
    assert [row["accuracy"] for row in rows] == [0.5] * 4
    assert sum(row["missing"] for row in rows) > 0
    assert sum(row["replies"] for row in rows) > 0


@pytest.mark.parametrize("what", ["Budget(", "product-update", "Terms(", "Limits("])
def test_what_the_readme_composes_can_be_made(what):
    (code,) = [block for block in blocks("python") if what in block]
    exec(compile(code, "README.md", "exec"), {})
