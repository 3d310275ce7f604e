"""Versions, read from the packages' metadata: importing torch would take seconds."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from fedkit.clients.broken_torchvision import check_torchvision
from fedkit.errors import ConfigError
from fedkit.flower import FLEET_IS_GRPC

from .finding import Finding, ok, problem, warning

PROGRAMS: Final = ("flwr", "flower-superlink", "flower-supernode")
CLIENT: Final = ("torch", "peft", "transformers")
OPTIONAL: Final = {"tensorboard": "--tensorboard", "mlflow-skinny": "--mlflow"}


def package_findings() -> Iterator[Finding]:
    """Yield the findings about Python, Flower, and what clients and trackers need."""
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform in ("linux", "darwin"):
        yield ok("Python", found)
    else:
        yield problem("Python", found, "fedkit runs on Linux and macOS. On Windows, use WSL.")
    yield _flower()
    yield _programs()
    yield _simulation()
    yield from _client()
    for name, flag in OPTIONAL.items():
        found = installed(name) or (installed("mlflow") if name == "mlflow-skinny" else "")
        extra = flag.removeprefix("--")
        yield ok(extra, found or f"not installed; for `fedkit run {flag}`: pip install 'fedkit[{extra}]'")


def installed(name: str) -> str:
    """Return the version of a package; empty if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _flower() -> Finding:
    found, transport = version("flwr"), "gRPC" if FLEET_IS_GRPC else "HTTP"
    said = f"{found}; SuperNodes speak {transport}"
    wanted = next((line for line in requires("fedkit") or [] if re.match(r"flwr\b(?!\[)", line)), "flwr")
    release = tuple(int(part) for part in found.split(".")[:2])
    if (1, 39) <= release < (2, 0):
        return ok("Flower", said)
    return problem("Flower", said, f"fedkit needs {wanted}: pip install '{wanted}'.")


def _programs() -> Finding:
    lacking = [name for name in PROGRAMS if not Path(sys.executable).with_name(name).exists()]
    if not lacking:
        return ok("Flower's programs", f"beside {sys.executable}")
    found = f"{', '.join(lacking)} not beside {sys.executable}"
    return problem("Flower's programs", found, "Run fedkit from the environment in which Flower is installed.")


def _simulation() -> Finding:
    if found := installed("ray"):
        return ok("simulation", f"ray {found}")
    return warning(
        "simulation", "no ray", "For `fedkit run` without --superlink: pip install 'fedkit[simulation]'."
    )


def _client() -> Iterator[Finding]:
    """Yield the findings about the packages that training needs; a server needs none of them."""
    versions = {name: installed(name) for name in CLIENT}
    found = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    lacking = [name for name, number in versions.items() if not number]
    if lacking:
        advice = "Clients need all of them: pip install 'fedkit[client]'. A server needs none."
        yield warning("training", f"{found or 'nothing'}; no {', '.join(lacking)}", advice)
    else:
        yield ok("training", f"{found}; torch is built for {torch_build()}")
    if find_spec("torchvision") is None:
        yield ok("torchvision", "not installed; fedkit does not need it")
        return
    try:
        check_torchvision()  # imports it, since nothing else can tell
        yield ok("torchvision", installed("torchvision"))
    except ConfigError as error:
        said, _, advice = str(error).partition("). ")
        yield problem("torchvision", f"{said})", advice)


def torch_build() -> str:
    """Return what torch is built for, without importing it."""
    spec = find_spec("torch")
    path = Path(spec.origin).with_name("version.py") if spec and spec.origin else None
    text = path.read_text("utf-8") if path and path.exists() else ""
    for name in ("cuda", "hip", "xpu"):
        if number := re.search(rf"^{name}\b.*= '(.+)'", text, re.MULTILINE):
            return f"{name.upper()} {number[1]}"
    return "CPUs"
