"""What else a deployment needs: ports, Flower's config, Docker."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from .finding import Finding, ok, problem, warning

PORTS: Final = {
    9092: "SuperNodes",
    8000: "flwr, by default",
    8100: "flwr, as the README has it",
    9094: "a SuperNode",
}
DOCKER_SECONDS: Final = 5.0


def service_findings() -> Iterator[Finding]:
    """Yield the findings about ports, Flower's config and Docker."""
    taken = [port for port in PORTS if not is_free(port)]
    if taken:
        found = ", ".join(f"{port} (for {PORTS[port]})" for port in taken)
        advice = "If that is not your SuperLink or SuperNode, give yours other ports. `fedkit run` finds its own."
        yield warning("ports", f"in use: {found}", advice)
    else:
        yield ok("ports", f"{', '.join(map(str, PORTS))} are free")
    yield _config()
    yield _docker()


def is_free(port: int) -> bool:
    """Return whether a program could listen on a port at all addresses."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def _config() -> Finding:
    path = Path(os.environ.get("FLWR_HOME", "~/.flwr")).expanduser() / "config.toml"
    what = "Flower's config"
    if not path.exists():
        return ok(what, f"no {path}; it is for `--superlink NAME`")
    try:
        tables = tomllib.loads(path.read_text("utf-8")).get("superlink", {})
    except (OSError, ValueError) as error:
        return problem(what, f"{path}: {error}", "Mend it: neither Flower nor `--superlink` can read it.")
    names = [name for name, table in tables.items() if isinstance(table, dict) and "address" in table]
    return ok(what, f"{path}: SuperLinks {', '.join(names)}" if names else f"{path}: no SuperLink with an address")


def _docker() -> Finding:
    if shutil.which("docker") is None:
        return ok("Docker", "not installed; it is for docker/ alone")
    try:
        command = ["docker", "info", "--format", "{{.ServerVersion}}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOCKER_SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return warning("Docker", "installed, but no engine answers", "For docker/: start it, or join its group.")
    return ok("Docker", f"engine {done.stdout.strip()}")
