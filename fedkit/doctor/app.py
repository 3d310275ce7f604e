"""Checks of an app's directory, read from its sources: none of its code is run."""

from __future__ import annotations

import ast
import dataclasses
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from fedkit.config import RunConfig
from fedkit.errors import ConfigError
from fedkit.plan import read_app
from fedkit.strategies.by_name import STRATEGIES, class_of

from .finding import Finding, ok, problem, warning

HEAVY: Final = ("torch", "torchvision", "transformers", "peft", "datasets", "sklearn")
BUNDLE_BYTES: Final = 10_000_000  # Flower accepts no larger app


def app_findings(app_dir: Path) -> Iterator[Finding]:
    """Yield the findings about an app."""
    try:
        name, config = read_app(app_dir)
        table = tomllib.loads((app_dir / "pyproject.toml").read_text("utf-8"))["tool"]["flwr"]["app"]
        components = {kind: str(table["components"][kind]) for kind in ("serverapp", "clientapp")}
    except ConfigError as error:
        yield problem("app", str(error), "Give the directory of a Flower App.")
        return
    except (KeyError, TypeError) as error:
        yield problem("app", f"[tool.flwr.app.components] lacks {error}", "Name the app's two components.")
        return
    known = {field.name.replace("_", "-") for field in dataclasses.fields(RunConfig)}
    yield ok("app", f"{name}, with {len(config)} run-config keys")
    if lacking := sorted(known - config.keys()):
        keys = ", ".join(lacking)
        advice = (
            "Add them, as in examples/quickstart, to set them with --run-config: `RunConfig` has the defaults."
        )
        yield warning("run config", f"without {keys}", advice)
    else:
        yield ok("run config", "all keys that fedkit knows")
    for kind, component in components.items():
        path = _file_of(app_dir, component.partition(":")[0])
        if path is None:
            yield problem(kind, f"no file for {component}", "Mend [tool.flwr.app.components].")
        elif kind == "clientapp":
            try:
                yield from _client(app_dir, path, str(config["strategy"]))
            except (SyntaxError, ValueError) as error:
                yield problem(kind, f"cannot be read: {error}", "Mend the file.")
    size = sum(path.stat().st_size for path in app_dir.rglob("*.py"))
    if size > BUNDLE_BYTES:
        yield problem("size", f"{size} bytes of Python", f"Flower takes apps of at most {BUNDLE_BYTES} bytes.")


def _client(app_dir: Path, path: Path, strategy: str) -> Iterator[Finding]:
    """Yield the findings about the module with the ClientApp."""
    found = list(heavy_imports(app_dir, path))
    if found:
        advice = (
            "Move it into the functions that need it: it costs seconds with every message, even a refused one."
        )
        yield warning("clientapp", f"imports at module level: {'; '.join(found)}", advice)
    else:
        yield ok("clientapp", "imports what is slow inside functions")
    mods, needed = _mods(ast.parse(path.read_text("utf-8"))), _mod_of(strategy)
    if not mods:
        advice = (
            f"fedkit's strategies need theirs: ClientApp(mods=[{needed or 'AquilaMod'}()]). FedAvg needs none."
        )
        yield warning("mods", "none", advice)
    elif needed and needed not in mods:
        found_mods = f"{', '.join(mods)}, and the strategy {strategy!r} needs {needed}"
        yield problem("mods", found_mods, f"Add it: ClientApp(mods=[…, {needed}()]). Several go side by side.")
    elif "WarmWorker" in mods[1:]:
        advice = "Put it first: in a deployment, it hands on messages as they came, and the worker runs all mods."
        yield problem("mods", f"{', '.join(mods)}: WarmWorker is not first", advice)
    elif "WarmWorker" not in mods and any(map(_is_heavy, app_dir.rglob("*.py"))):
        advice = "WarmWorker(__file__) first among the mods saves importing torch for each message."
        yield warning("mods", f"{', '.join(mods)}; no WarmWorker", advice)
    else:
        yield ok("mods", ", ".join(mods))


def _mod_of(strategy: str) -> str:
    """Return the name of the mod that clients need for a strategy; empty for Flower's FedAvg and unknown ones."""
    scheme = getattr(class_of(STRATEGIES[strategy]), "scheme", "") if strategy in STRATEGIES else ""
    return "".join(map(str.capitalize, scheme.split("-"))) + "Mod" if scheme else ""


def _is_heavy(path: Path) -> bool:
    """Return whether a module imports a slow package anywhere."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    imports = [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]
    return any(name.split(".")[0] in HEAVY for node in imports for name in _names(node, ""))


def heavy_imports(app_dir: Path, path: Path, seen: set[Path] | None = None) -> Iterator[str]:
    """Yield where a module, or an app module that it imports, imports a slow package at import time."""
    seen = set() if seen is None else seen
    if path in seen:
        return
    seen.add(path)
    package = ".".join(path.relative_to(app_dir).with_suffix("").parts[:-1])
    for node in _at_import(ast.parse(path.read_text("utf-8")).body):
        for name in _names(node, package):
            if name.split(".")[0] in HEAVY:
                yield f"{name.split('.')[0]} in {path.relative_to(app_dir)}, line {node.lineno}"
                break
            if (other := _file_of(app_dir, name)) is not None:
                yield from heavy_imports(app_dir, other, seen)


def _at_import(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    """Yield the imports that run when a module is imported."""
    for node in body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from _at_import(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With | ast.ClassDef):
            yield from _at_import([child for child in ast.iter_child_nodes(node) if isinstance(child, ast.stmt)])


def _names(node: ast.Import | ast.ImportFrom, package: str) -> list[str]:
    """Return the modules that an import statement may import."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
    base = ".".join([*parents, *([node.module] if node.module else [])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def _file_of(app_dir: Path, module: str) -> Path | None:
    """Return the file of a module of the app; None if it is not the app's."""
    path = app_dir.joinpath(*module.split("."))
    return next(
        (file for file in (path.with_suffix(".py"), path / "__init__.py") if module and file.is_file()), None
    )


def _mods(tree: ast.Module) -> list[str]:
    """Return the names of the mods that a ClientApp is constructed with."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "ClientApp":
            for keyword in node.keywords:
                if keyword.arg == "mods" and isinstance(keyword.value, ast.List):
                    return [ast.unparse(item).partition("(")[0].split(".")[-1] for item in keyword.value.elts]
    return []
