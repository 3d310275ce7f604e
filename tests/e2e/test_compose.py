"""The compose demo, as documented: it builds, learns, outlives a SuperNode, ends by itself, and leaves a model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from fedkit.config import parse
from fedkit.report import read_rounds

ROOT = Path(__file__).parents[2]
ROUNDS, SECONDS = 6, 1800.0
pytestmark = [pytest.mark.compose, pytest.mark.slow]


class Demo:
    """A clone of the repository, with the containers of its own project."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder / "docker", folder.parent / "compose.log"
        for name in subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True).split("\0")[:-1]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
        self.program = ["docker", "compose"] if has_plugin() else ["docker-compose"]
        self.environment = os.environ | {"COMPOSE_PROJECT_NAME": f"fedkit-{os.getpid()}", "ROUNDS": f"{ROUNDS}"}

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("wb") as file:
            command = [*self.program, "up", "--build", "--exit-code-from", "job"]
            return subprocess.Popen(command, cwd=self.folder, env=self.environment, stdout=file, stderr=file)

    def compose(self, *arguments: str) -> str:
        command = [*self.program, *arguments]
        return subprocess.check_output(command, cwd=self.folder, env=self.environment, text=True)

    def kill(self, service: str, command: str) -> None:
        """Kill a program in a container with SIGKILL, from outside."""
        container = self.compose("ps", "-q", service).strip()
        lines = subprocess.check_output(["docker", "top", container, "-eo", "pid,args"], text=True).splitlines()
        (pid,) = [int(line.split()[0]) for line in lines if f"/bin/{command} " in line]
        os.kill(pid, signal.SIGKILL)

    def rows(self, folders: str) -> list[dict[str, Any]]:
        return [
            dict(row)
            for path in self.folder.glob(f"fedkit-runs/{folders}/rounds.jsonl")
            for row in read_rounds(path)
        ]


def has_plugin() -> bool:
    return subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Demo]:
    engine = shutil.which("docker") and subprocess.run(["docker", "info"], capture_output=True).returncode == 0
    if not engine and "FEDKIT_COMPOSE" not in os.environ:  # where that is set, there must be one
        pytest.skip("no Docker engine; .ci/engine starts one")
    demo = Demo(tmp_path / "clone")
    try:
        yield demo
    finally:
        subprocess.run([*demo.program, "down", "--volumes"], cwd=demo.folder, env=demo.environment)


def wait_until(done: Callable[[], bool], up: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while not done():
        said = log.read_text(errors="replace")[-5000:]
        assert up.poll() is None, f"`up` ended with code {up.returncode}: {said}"
        assert time.monotonic() < deadline, said
        time.sleep(1)


def test_the_documented_command_ends_with_a_trained_model_on_the_host(demo: Demo) -> None:
    with demo.start() as up:
        wait_until(lambda: len(demo.rows("quickstart-*-????????/*")) > 2, up, demo.log)
        demo.kill("supernode-1", "flower-supernode")
        assert up.wait(SECONDS) == 0, demo.log.read_text(errors="replace")[-5000:]

    (run,) = demo.folder.glob("fedkit-runs/quickstart-*-????????/aquila-seed0")
    rows = read_rounds(run / "rounds.jsonl")
    assert [row["round"] for row in rows] == list(range(ROUNDS + 1))
    assert rows[-1]["accuracy"] > 0.85
    assert sum(row["fp32-bytes"] for row in rows) > 10 * sum(row["uplink-bytes"] for row in rows[1:])
    assert rows[-1]["replies"] >= 2, "the run has outlived it"
    said = demo.log.read_text(errors="replace")
    assert "keep-running: flower-supernode ended with code 137" in said
    assert f"round {ROUNDS}/{ROUNDS}" in said, "progress is shown"
    (shown,) = (path for path in demo.folder.glob("fedkit-runs/*/aquila-seed0/run.json"))
    assert json.loads(shown.read_text())["status"] == "completed"
    assert accuracy(run / "adapter") == pytest.approx(rows[-1]["accuracy"], abs=0.002)


def accuracy(adapter: Path) -> float:
    """Return how well the adapter does that was left on the host."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples" / "quickstart")
        from quickstart import task
    text = (ROOT / "examples" / "quickstart" / "pyproject.toml").read_text()
    config = parse(task.Config, tomllib.loads(text)["tool"]["flwr"]["app"]["config"])
    backbone = task.build_model(config).unload()
    _, _, images, labels = task.load_split()
    return task.evaluate(PeftModel.from_pretrained(backbone, adapter), images, labels)["accuracy"]
