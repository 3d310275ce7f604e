"""The direction of dependencies, over the syntax trees of the sources; and the public names."""

import ast
import sys
from pathlib import Path

import pytest

import fedkit
import fedkit.clients
import fedkit.strategies

ROOT = Path(__file__).parents[1]
FOLDERS = {"strategies": "fedkit.strategies", "clients": "fedkit.clients", "fedkit": "fedkit"}
SOURCES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

LAYERS = [  # each may import from its own layer and from those below
    {
        "fedkit.cli",
        "fedkit.display",
        "fedkit.doctor",
        "fedkit.options",
        "fedkit.forecast",
        "fedkit.rehearsal",
        "fedkit.plan",
        "fedkit.record",
        "fedkit.outcome",
        "fedkit.launch",
        "fedkit.submit",
        "fedkit.follow",
        "fedkit.report",
        "fedkit.trackers",
    },
    {"fedkit.strategies", "fedkit.clients"},
    {"fedkit.adapter"},
    {"fedkit.rounds", "fedkit.faulty"},
    {"fedkit.booking", "fedkit.in_process"},
    {"fedkit.broadcast", "fedkit.memory", "fedkit.state", "fedkit.checkpoint", "fedkit.ledger", "fedkit.entry"},
    {"fedkit.message", "fedkit.ordinary", "fedkit.parcel", "fedkit.skipping", "fedkit.calls"},
    {"fedkit.flower", "fedkit.config", "fedkit.sockets", "fedkit.files"},
    {"fedkit.codec", "fedkit.aggregation", "fedkit.faults", "fedkit.limits", "fedkit.processes"},
    {"fedkit.row_masks", "fedkit.submodels"},
    {"fedkit.arrays", "fedkit.errors", "fedkit.assets", "fedkit"},
]
FORBIDDEN_PAIRS = [
    ("fedkit.strategies", "fedkit.clients"),
    ("fedkit.clients", "fedkit.strategies"),
    ("fedkit.codec", "fedkit.aggregation"),
    ("fedkit.aggregation", "fedkit.codec"),
]
FLOWER_PUBLIC = ("flwr.app", "flwr.clientapp", "flwr.serverapp")


def module_of(path: Path) -> str:
    top, *rest = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([FOLDERS[top], *(part for part in rest if part != "__init__")])


def imports_of(path: Path) -> set[str]:
    package = module_of(path) if path.name == "__init__.py" else module_of(path).rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"{path}: relative import upwards"
            base = node.module or ""
            found.add(f"{package}.{base}".rstrip(".") if node.level else base)
    return found


def part_of(module: str) -> str:
    return ".".join(module.split(".")[:2])


def layer(module: str) -> int:
    return next(depth for depth, names in enumerate(LAYERS) if part_of(module) in names)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_go_one_way(path):
    me = module_of(path)
    for other in (name for name in imports_of(path) if name.split(".")[0] == "fedkit"):
        assert part_of(other) == part_of(me) or layer(other) >= layer(me), f"{me} imports {other}"
        assert (part_of(me), part_of(other)) not in FORBIDDEN_PAIRS, f"{me} imports {other}"


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_only_their_places_know_torch_and_flowers_private_modules(path):
    me = module_of(path)
    for name in imports_of(path):
        top = name.split(".")[0]
        assert top not in ("pickle", "dill", "cloudpickle", "marshal", "shelve"), f"{me} imports {name}"
        if top in ("torch", "peft", "transformers", "datasets", "sklearn", "torchvision"):
            assert part_of(me) == "fedkit.clients", f"{me} imports {name}"
        if top == "flwr" and me != "fedkit.flower":
            assert name.startswith(FLOWER_PUBLIC), f"{me} imports {name}, which is not public"
        if part_of(me) in ("fedkit.codec", "fedkit.aggregation", "fedkit.arrays"):
            assert top != "flwr", f"{me} imports {name}"


def test_every_folder_with_code_is_a_package_that_ships():
    import tomllib

    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    assert packages == {module_of(path) for path in SOURCES if path.name == "__init__.py"}


def test_the_folders_are_imported_by_their_package_names_alone():
    assert fedkit.strategies.Aquila.__module__ == "fedkit.strategies.aquila"
    assert fedkit.clients.AquilaMod.__module__ == "fedkit.clients.aquila"
    assert not {"strategies", "clients"} & set(sys.modules)


@pytest.mark.parametrize("package", [fedkit.strategies, fedkit.clients], ids=lambda p: p.__name__)
def test_exports_are_what_is_public(package):
    assert all(hasattr(package, name) for name in package.__all__)
    assert sorted(package.__all__) == sorted(set(package.__all__))


def test_files_and_functions_stay_small():
    for path in SOURCES:
        text = path.read_text()
        assert text.count("\n") <= 250, f"{path} is too long"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                lines = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
                assert lines <= 40, f"{path}: {node.name} has {lines} lines"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "examples").glob("*/*/client_app.py")), ids=lambda p: p.parent.name
)
def test_an_example_s_client_is_read_in_a_minute(path):
    assert path.read_text().count("\n") < 60


def test_a_server_needs_no_torch():
    import subprocess

    code = "import sys, fedkit.strategies, fedkit.clients, fedkit.rounds; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
