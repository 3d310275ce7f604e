"""The one entry point: ``python -m benchmarks`` lists the benchmarks, and runs those that are named, or ``all``.

``python -m benchmarks all`` runs the small form of each, with ``--full`` the README's figures. A benchmark whose
rows are already in ``--out`` is not measured again: it prints its tables, and draws its plots, from them. What
follows ``--`` is passed to the benchmark.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.claims import claims

HERE = Path(__file__).parent
PLOTS = {"codec": "codec.png", "safari": "safari.png"}  # which take --plot FILE, with matplotlib


def benchmarks() -> dict[str, str]:
    """Return all benchmarks, the first line of each one's docstring."""
    found = {}
    for path in sorted(HERE.glob("*.py")):
        text = path.read_text()
        if path.stem not in ("__main__", "rm_lora_vit") and 'if __name__ == "__main__":' in text:
            found[path.stem] = (ast.get_docstring(ast.parse(text)) or "").split("\n")[0]
    return found


def command(name: str, options: argparse.Namespace, rest: list[str]) -> list[str]:
    """Return the command line of one benchmark."""
    words = [sys.executable, "-m", f"benchmarks.{name}", *rest]
    if name == "claims":
        return words
    words += ["--full"] if options.full else []
    if name in PLOTS and find_spec("matplotlib"):
        words += ["--plot", str(Path(options.out, PLOTS[name]))]
    return words if name == "fuzz" else [*words, "--out", options.out]


def main(argv: list[str] | None = None) -> int:
    """List, or run one after the other; return how many failed."""
    arguments = argparse.ArgumentParser(prog="python -m benchmarks", description=(__doc__ or "").split("\n")[0])
    arguments.add_argument("names", nargs="*", help="which; all: every one")
    arguments.add_argument("--full", action="store_true", help="the README's figures instead of a quick look")
    arguments.add_argument("--out", default="benchmark-runs", help="where rows and plots are kept (%(default)s)")
    given = sys.argv[1:] if argv is None else argv
    own, rest = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    options, known = arguments.parse_args(own), benchmarks()
    names = list(known) if options.names == ["all"] else options.names
    if unknown := set(names) - known.keys():
        arguments.error(f"unknown: {', '.join(sorted(unknown))}. Known: {', '.join(known)}.")
    if not names:
        table = Table("benchmark", "what it measures", "figures of")
        for name, what in known.items():
            commits = {claim.commit for claim in claims() if f"benchmarks.{name} " in f"{claim.command} "}
            table.add_row(name, what, ", ".join(sorted(commits)))
        Console().print(table)
        return 0
    Path(options.out).mkdir(parents=True, exist_ok=True)
    failed = []
    for name in names:
        print(f"=== {name}", flush=True)
        if subprocess.run(command(name, options, rest), check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
