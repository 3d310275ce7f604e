"""Clear errors for a torchvision that does not fit torch, since PEFT and transformers fail along with it.

Each build of torchvision fits one build of torch; on PyPI for x86-64, the one with CUDA. With another torch its
import fails, and so does what transformers imports lazily. PEFT then reports that a Bloom model is missing, which
does not point to the cause.
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
    """Check that torchvision, if it is installed, can be imported, which takes seconds.

    Raises
    ------
    ConfigError
        If it cannot be imported, with the release of torch that it is built for and the command that helps.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import_module("torchvision")
    except Exception as error:  # usually a RuntimeError
        raise ConfigError(_explain(error)) from error


@contextmanager
def naming_torchvision() -> Iterator[None]:
    """Raise the ConfigError of `check_torchvision` if an import in the block fails because of torchvision.

    Imports that succeed take no extra time; those that fail for another reason raise their own error.
    """
    try:
        yield
    except (ImportError, RuntimeError):
        check_torchvision()
        raise


def _explain(error: Exception) -> str:
    """Return what is wrong with torchvision, and what to do about it."""
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
    """Return the version of torch that torchvision requires, as in its metadata."""
    try:
        lines = requires("torchvision") or []
    except PackageNotFoundError:
        lines = []
    return next((line for line in lines if re.match(r"torch\b(?!-)", line)), "the torch")
