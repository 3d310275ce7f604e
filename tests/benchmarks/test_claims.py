"""Every figure of the READMEs has a command, a commit, and a small form for when its modules have changed."""

import ast
import re
import subprocess

import pytest

from benchmarks.claims import ROOT, claims

CLAIMS = claims()
READMES = " ".join(" ".join(path.read_text().split()) for path in [ROOT / "README.md", *ROOT.glob("*/README.md")])
FIGURELESS = {"claims", "fuzz", "innovations", "warm"}


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.command)
def test_a_claim_stands_in_a_readme_beside_its_command_and_its_commit(claim):
    assert claim.says in READMES
    assert claim.command in READMES
    assert claim.commit in READMES
    assert all((ROOT / module).exists() for module in claim.modules)
    if claim.rows:
        assert claim.commit in (ROOT / "benchmarks" / "results" / claim.rows).read_text()


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.command)
def test_its_small_form_is_a_test_that_ci_runs_or_a_function_with_a_tolerance(claim):
    if claim.function:
        assert claim.value > 0 < claim.tolerance
        return
    path, _, name = claim.small.partition("::")
    (found,) = [node for node in ast.parse((ROOT / path).read_text()).body if getattr(node, "name", "") == name]
    assert not any(ast.unparse(each) == "pytest.mark.full" for each in found.decorator_list)


def test_every_benchmark_that_a_readme_names_has_its_claim():
    named = set(re.findall(r"python -m benchmarks\.(\w+)", READMES)) - FIGURELESS
    assert named == {name for claim in CLAIMS for name in re.findall(r"benchmarks\.(\w+)", claim.command)}


def test_a_changed_module_makes_a_claim_stale():
    git = subprocess.run(["git", "-C", ROOT, "cat-file", "-e", CLAIMS[0].commit], capture_output=True, check=False)
    if git.returncode:
        pytest.skip("without git's history every claim is stale")
    (old,) = [claim for claim in CLAIMS if claim.says == "40 times fewer bytes up"]
    assert old.changed


@pytest.mark.slow
@pytest.mark.parametrize(
    "claim",
    {claim.small: claim for claim in CLAIMS if claim.function and not claim.timed}.values(),
    ids=lambda claim: claim.small.partition(":")[2],
)
def test_a_stale_figure_agrees_in_small_form(claim):
    if claim.changed:
        holds, found = claim.agrees()
        assert holds, f"{found:.4g}, but {claim.value} at {claim.commit}: measure again with {claim.command}"
