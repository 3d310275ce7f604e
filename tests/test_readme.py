"""The READMEs keep their word: commands are one line each, code runs, links lead somewhere."""

import re
from pathlib import Path

import numpy as np
import pytest

from fedkit.codec.wire import read_header
from fedkit.message import read_frame, to_arrays
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


@pytest.mark.parametrize("what", ["Budget(", "product-update", "Terms(", "Limits("])
def test_what_the_readme_composes_can_be_made(what):
    (code,) = [block for block in blocks("python") if what in block]
    exec(compile(code, "README.md", "exec"), {})
