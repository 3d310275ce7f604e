"""What a user installs: the wheel made from the sdist, its files, and that it works away from the repository."""

import importlib
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_source_once_and_nothing_else(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"fedkit/{'' if folder == 'fedkit' else folder + '/'}{path.relative_to(ROOT / folder).as_posix()}"
        for folder in ("fedkit", "strategies", "clients")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == expected


def test_the_wheel_works_from_elsewhere(wheel, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "import fedkit, fedkit.strategies as s, fedkit.clients as c\n"
        f"assert fedkit.__file__.startswith({str(wheel)!r}) and s.__file__.startswith({str(wheel)!r})\n"
        "print(s.Aquila.__name__, c.AquilaMod.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "Aquila AquilaMod\n", done.stderr


USER = """
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import Strategy

from fedkit.clients import AquilaMod, ErrorFeedbackMod
from fedkit.codec import Codec, EntropyConstrained
from fedkit.strategies import Aquila, ErrorFeedback, Limits

app = ClientApp(mods=[AquilaMod(), ErrorFeedbackMod()])
strategies: list[Strategy] = [
    Aquila(limits=Limits(quorum=0.8), fraction_evaluate=0.0),
    ErrorFeedback(quantizer=EntropyConstrained(0.5), downlink=Codec(EntropyConstrained(1.0))),
]
"""


@pytest.fixture(scope="module")
def elsewhere(wheel, tmp_path_factory) -> Path:
    """An environment with the wheel, over the packages that are installed here, without the repository."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True, timeout=120)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "below.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", site, wheel]
    subprocess.run(install, check=True, timeout=120)
    return folder / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("checker", [pytest.param("mypy", marks=pytest.mark.full), "pyright"])
def test_the_wheel_type_checks_for_its_users(elsewhere, checker, tmp_path):
    """What is right has no error, each of the lines that are wrong has one."""
    command = [sys.executable, "-m", "mypy", "--strict", "--python-executable", elsewhere]
    if checker == "pyright":
        pytest.importorskip("pyright", reason="pip install pyright")
        command = [sys.executable, "-m", "pyright", "--pythonpath", elsewhere]
        if subprocess.run([*command, "--version"], capture_output=True, timeout=300, check=False).returncode:
            pytest.skip("pyright needs node, or to download it")
    wrong = ["Aquila(beta='much')", "Limits(quorums=0.8)", "EntropyConstrained([])"]
    (tmp_path / "user.py").write_text(USER + "\n".join(wrong) + "\n")
    done = subprocess.run(
        [*command, "user.py"], cwd=tmp_path, capture_output=True, text=True, timeout=500, check=False
    )
    first = USER.count("\n") + 1
    lines = {int(number) for number in re.findall(r"user\.py:(\d+):.*error", done.stdout)}
    assert lines == set(range(first, first + len(wrong))), done.stdout + done.stderr


@pytest.mark.parametrize("package", ["strategies", "clients", "codec"])
def test_what_is_exported_is_what_is_documented(package):
    readme = {"codec": ROOT / "strategies"}.get(package, ROOT / package) / "README.md"
    section = readme.read_text().partition(f"## `fedkit.{package}`\n")[2].partition("\n## ")[0]
    documented = re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)
    assert documented == sorted(importlib.import_module(f"fedkit.{package}").__all__)


@pytest.mark.slow
def test_the_api_is_documented_by_the_command_of_the_readme_without_warnings(tmp_path):
    pytest.importorskip("pdoc", reason="pip install pdoc")
    (command,) = re.findall(r"`(pdoc -d numpy [^`]*)`", (ROOT / "README.md").read_text())
    words = [sys.executable, "-m", *command.split(), "-o", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    warnings = [line for line in done.stderr.splitlines() if "Warn" in line]
    assert all("protocol.Aggregate" in line for line in warnings)  # generic NamedTuples are too much for pdoc
    for package in ("strategies", "clients", "codec"):
        page = (tmp_path / "fedkit" / f"{package}.html").read_text()
        assert all(f'id="{name}"' in page for name in importlib.import_module(f"fedkit.{package}").__all__)
