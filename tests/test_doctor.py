"""`fedkit doctor`: what it finds, and what it says to do."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from fedkit import cli, doctor
from fedkit.doctor import machine, packages, services
from fedkit.doctor.app import app_findings, heavy_imports
from fedkit.errors import ConfigError

ROOT = Path(__file__).parents[1]
TINY_APP = ROOT / "tests" / "fixtures" / "tiny_app"


def levels(findings) -> dict[str, str]:
    return {finding.what: finding.level for finding in findings}


def by_name(findings, what: str):
    return next(finding for finding in findings if finding.what == what)


@pytest.mark.parametrize("app", ["quickstart", "text_lora", "vision", "multitask"])
def test_the_examples_are_as_it_wants_them(app: str) -> None:
    found = list(app_findings(ROOT / "examples" / app))
    assert [finding.what for finding in found] == ["app", "run config", "clientapp", "mods"]
    assert levels(found)["clientapp"] == levels(found)["app"] == "ok", found


def test_it_looks_at_everything_without_importing_torch() -> None:
    code = "import sys, fedkit.cli; code = fedkit.cli.main(['doctor', '--json']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {line["what"]: line for line in json.loads(done.stdout)}
    whats = "Python Flower simulation training torchvision processors memory GPU ports Docker"
    assert set(whats.split()) <= found.keys()
    assert all(line["advice"] or line["level"] == "ok" for line in found.values())


def test_what_is_imported_on_import_is_found_also_in_other_modules_of_the_app(tmp_path: Path) -> None:
    app = tmp_path / "app"
    app.mkdir()
    (app / "__init__.py").touch()
    (app / "client_app.py").write_text(
        "from typing import TYPE_CHECKING\nfrom app import task\nfrom .other import x\n"
        "if TYPE_CHECKING:\n    import torch\ndef train():\n    import peft\n"
    )
    (app / "task.py").write_text("import numpy\nimport torch.nn as nn\nfrom app import client_app\n")
    (app / "other.py").write_text("try:\n    from transformers import x\nexcept ImportError:\n    x = None\n")
    found = set(heavy_imports(tmp_path, app / "client_app.py"))
    assert found == {"torch in app/task.py, line 2", "transformers in app/other.py, line 2"}


@pytest.mark.parametrize(
    ("old", "new", "what", "level"),
    [
        ("[tool.flwr.app.components]", "[tool.other]", "app", "problem"),
        ("tiny_app.client_app:app", "tiny_app.nowhere:app", "clientapp", "problem"),
        ("seed = 0\n", "", "app", "problem"),
        ("deadline = 0.0\n", "", "run config", "warning"),
        ("", "", "mods", "ok"),
    ],
)
def test_an_app_that_does_not_fit_is_told_what_to_do(
    tmp_path: Path, old: str, new: str, what: str, level: str
) -> None:
    shutil.copytree(TINY_APP, tmp_path / "app")
    path = tmp_path / "app" / "pyproject.toml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    finding = by_name(app_findings(tmp_path / "app"), what)
    assert finding.level == level
    assert finding.advice or level == "ok"


def test_an_app_with_torch_and_no_worker_is_told_of_it_and_one_without_mods_too(tmp_path: Path) -> None:
    shutil.copytree(TINY_APP, tmp_path / "app")
    client = tmp_path / "app" / "tiny_app" / "client_app.py"
    text = client.read_text()
    client.write_text(f"{text}\n\ndef load():\n    import torch\n")
    assert by_name(app_findings(tmp_path / "app"), "mods").level == "warning"
    client.write_text(text.replace("ClientApp(mods=", "ClientApp(").replace("TacMod()])", "TacMod()][:0])"))
    assert "AquilaMod" in by_name(app_findings(tmp_path / "app"), "mods").advice


@pytest.mark.parametrize(
    ("strategy", "mod"), [("safari", "SafariMod"), ("error-feedback", "ErrorFeedbackMod"), ("marina", "AquilaMod")]
)
def test_the_mod_that_the_strategy_needs_is_missed(tmp_path: Path, strategy: str, mod: str) -> None:
    shutil.copytree(TINY_APP, tmp_path / "app")
    pyproject, client = tmp_path / "app" / "pyproject.toml", tmp_path / "app" / "tiny_app" / "client_app.py"
    pyproject.write_text(pyproject.read_text().replace('strategy = "fedavg"', f'strategy = "{strategy}"'))
    assert by_name(app_findings(tmp_path / "app"), "mods").level == "ok"
    client.write_text(client.read_text().replace(f"{mod}(), ", "").replace(f", {mod}()]", "]"))
    finding = by_name(app_findings(tmp_path / "app"), "mods")
    assert finding.level == "problem"
    assert f"needs {mod}" in finding.found
    assert f"{mod}()" in finding.advice


def test_a_client_that_is_no_python_is_a_problem(tmp_path: Path) -> None:
    shutil.copytree(TINY_APP, tmp_path / "app")
    (tmp_path / "app" / "tiny_app" / "client_app.py").write_text("def (")
    assert by_name(app_findings(tmp_path / "app"), "clientapp").level == "problem"


def test_a_port_in_use_and_a_config_that_cannot_be_read_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text("[superlink.lab\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        monkeypatch.setattr(services, "PORTS", {port: "tests"})
        assert not services.is_free(port)
        assert cli.main(["doctor"]) == 1, "a config that is broken must be mended"
    said = capsys.readouterr().out
    assert f"! ports: in use: {port} (for tests)" in said
    assert "✗ Flower's config" in said
    (tmp_path / "config.toml").write_text('[superlink.lab]\naddress = "127.0.0.1:1"\n')
    assert "SuperLinks lab" in by_name(services.service_findings(), "Flower's config").found


@pytest.mark.parametrize(("free", "level"), [(1e7, "problem"), (1e9, "warning"), (1e11, "ok")])
def test_a_disk_that_is_almost_full_is_found(monkeypatch: pytest.MonkeyPatch, free: float, level: str) -> None:
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    assert by_name(machine.machine_findings(), "disk for runs").level == level


def test_a_torchvision_that_does_not_fit_is_a_problem_with_the_command_that_helps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise ConfigError("torchvision 0.1 cannot be imported (no such build). Run `pip uninstall torchvision`.")

    monkeypatch.setattr(packages, "find_spec", lambda name: SimpleNamespace(origin=None))
    monkeypatch.setattr(packages, "check_torchvision", fail)
    finding = by_name(packages.package_findings(), "torchvision")
    assert finding.level == "problem"
    assert finding.found == "torchvision 0.1 cannot be imported (no such build)"
    assert finding.advice.startswith("Run `pip uninstall")


def test_a_flower_that_is_too_old_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "version", lambda name: "1.38.2")
    assert by_name(packages.package_findings(), "Flower").level == "problem"
    assert levels(doctor.examine())["Python"] == "ok"


def test_a_worker_that_is_not_first_is_a_problem(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples" / "quickstart", tmp_path / "app")
    client = tmp_path / "app" / "quickstart" / "client_app.py"
    text = client.read_text()
    client.write_text(
        text.replace("mods=[WarmWorker(__file__), AquilaMod()", "mods=[AquilaMod(), WarmWorker(__file__)")
    )
    finding = by_name(app_findings(tmp_path / "app"), "mods")
    assert finding.level == "problem"
    assert "first" in finding.advice
