"""A torchvision that does not fit torch, named, since it takes PEFT and transformers down with it.

torchvision is built for one build of torch, on PyPI for x86-64 for that with CUDA. Beside another it fails at
import, and with it what transformers imports lazily: PEFT then misses a Bloom model, which says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec

from fedkit.errors import ConfigError


def check_torchvision() -> None:
    """Check that torchvision, if it is installed, can be imported; that takes seconds.

    Raises
    ------
    ConfigError
        If it cannot, with the release of torch that it is built for, and the command that helps.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:  # a RuntimeError as a rule
        raise ConfigError(_explain(error)) from error


@contextmanager
def naming_torchvision() -> Iterator[None]:
    """Raise ConfigError, as `check_torchvision` does, where an import fails for a broken torchvision.

    Imports that succeed cost nothing; those that fail for another reason raise what they raised.
    """
    try:
        yield
    except (ImportError, RuntimeError):
        check_torchvision()
        raise


def _explain(error: Exception) -> str:
    """Return what is wrong with torchvision, and what to do."""
    return (
        f"torchvision {_version('torchvision')} cannot be imported, and PEFT and transformers fail with it: "
        f"expected {_required_torch()} of the same build, got torch {_version('torch')} "
        f"({type(error).__name__}: {error}). "
        "Unless you need torchvision, run `pip uninstall torchvision`; else take both from one index, "
        "`pip install --force-reinstall torch torchvision`."
    )


def _version(package: str) -> str:
    """Return the version of an installed package."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "of unknown version"


def _required_torch() -> str:
    """Return the torch that torchvision requires, as its metadata says it."""
    try:
        lines = requires("torchvision") or []
    except PackageNotFoundError:
        lines = []
    return next((line for line in lines if re.match(r"torch\b(?!-)", line)), "the torch")
