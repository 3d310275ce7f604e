"""A torchvision that fails at import, in a real process: the word that fedkit has for it."""

import os
import subprocess
import sys

import pytest

from fedkit.clients.broken_torchvision import check_torchvision, naming_torchvision
from fedkit.errors import ConfigError

CODE = """
from importlib import import_module
for name in ("adapters", "rm_lora", "rm_lora_trainer"):
    try:
        import_module(f"fedkit.clients.{name}")
    except Exception as error:
        print(name, type(error).__name__, error)
"""


def install_broken_torchvision(folder, failure="RuntimeError('operator torchvision::nms does not exist')"):
    """Make a torchvision in `folder` that fails as the real one does beside a torch it is not built for."""
    (folder / "torchvision").mkdir()
    (folder / "torchvision/__init__.py").write_text(f"raise {failure}\n")
    (folder / "torchvision-0.29.1.dist-info").mkdir()
    (folder / "torchvision-0.29.1.dist-info/METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.29.1\n"
        "Requires-Dist: numpy\nRequires-Dist: torch-x; extra == 'x'\nRequires-Dist: torch (==2.14.1)\n"
    )


def test_modules_that_need_peft_or_transformers_name_it_and_say_what_helps(tmp_path):
    import torch

    install_broken_torchvision(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [name, "ConfigError"] for name in ("adapters", "rm_lora", "rm_lora_trainer")
    ]
    for line in lines:
        assert "torchvision 0.29.1 cannot be imported" in line
        assert f"expected torch (==2.14.1) of the same build, got torch {torch.__version__} " in line
        assert "RuntimeError: operator torchvision::nms does not exist" in line
        assert "`pip uninstall torchvision`" in line
        assert "`pip install --force-reinstall torch torchvision`" in line
        assert "Bloom" not in line


def test_the_check_is_silent_without_torchvision_or_with_one_that_works(tmp_path, monkeypatch):
    check_torchvision()  # this environment's
    install_broken_torchvision(tmp_path, failure="RuntimeError('broken')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    with pytest.raises(ConfigError, match="RuntimeError: broken"):
        check_torchvision()
    (tmp_path / "torchvision/__init__.py").write_text("")
    check_torchvision()
    del sys.modules["torchvision"]  # the real one comes back, if there is one


def test_what_fails_for_another_reason_fails_with_its_own_words():
    with pytest.raises(ImportError, match="no_such_module"), naming_torchvision():
        import no_such_module  # noqa: F401
