"""Two of four nodes are behind a link, in a network namespace; the link is cut in mid-round, and restored."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.deployment import NAME, Deployment, node_name
from benchmarks.processes import wait_until
from fedkit.config import RUNS_DIR
from fedkit.processes import program
from fedkit.report import read_rounds

APP = Path(__file__).parents[1] / "fixtures" / "tiny_app"
HERE, THERE = "192.0.2.1", "192.0.2.2"  # addresses for documentation: nobody else's
NODES, ROUNDS = 4, 9
pytestmark = [
    pytest.mark.deployment,
    pytest.mark.slow,
    pytest.mark.skipif(
        os.geteuid() != 0 or shutil.which("ip") is None, reason="network namespaces need root and `ip` (iproute2)"
    ),
]


class Link:
    """A cable between two network namespaces, in one of which the test is."""

    def __init__(self) -> None:
        self.near, self.far = (f"fedkit-{os.getpid()}-{side}" for side in ("near", "far"))
        for name in (self.near, self.far):
            ip(f"netns add {name}")
            ip(f"-n {name} link set lo up")
        ip(f"-n {self.near} link add cable type veth peer name cable netns {self.far}")
        for name, address in ((self.near, HERE), (self.far, THERE)):
            ip(f"-n {name} addr add {address}/30 dev cable")
            ip(f"-n {name} link set cable up")

    def up(self) -> None:
        ip(f"-n {self.near} link set cable up")

    def cut(self) -> None:
        ip(f"-n {self.near} link set cable down")

    def remove(self) -> None:
        for name in (self.near, self.far):
            subprocess.run(["ip", "netns", "del", name])


def ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def enter(namespace: str) -> None:
    """Move this thread, and what it starts from now on, to a network namespace, given as a file."""
    new_network = 0x40000000
    with open(namespace) as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), new_network):
            raise OSError(ctypes.get_errno(), f"cannot enter {namespace}")


@pytest.fixture
def link() -> Iterator[Link]:
    before, link = os.open("/proc/thread-self/ns/net", os.O_RDONLY), None
    try:
        link = Link()
        enter(f"/run/netns/{link.near}")
        yield link
    finally:
        enter(f"/proc/self/fd/{before}")
        os.close(before)
        if link is not None:
            link.remove()


def test_rounds_go_on_without_nodes_behind_a_cut_link_and_with_them_once_it_is_restored(
    tmp_path: Path, link: Link
) -> None:
    app, settings = shutil.copytree(APP, tmp_path / "tiny-app"), {RUNS_DIR: str(tmp_path)}
    behind = {node_name(i): link.far for i in (2, 3)}
    options = ["--strategy", "aquila", "--rounds", str(ROUNDS), "--run-config", f"num-clients={NODES}"]
    limits = ["quorum=0.5", "grace=4.0", "deadline=60.0", "round-seconds=0.3"]
    with Deployment(tmp_path / "d", NODES, settings=settings, host=HERE, namespaces=behind) as deployment:
        command = [
            program("fedkit"),
            "run",
            app,
            "--superlink",
            NAME,
            "--out",
            tmp_path / "out",
            *options,
            *limits,
        ]
        with subprocess.Popen(command, env=deployment.environment) as run:
            path = tmp_path / "out" / "aquila-seed0" / "rounds.jsonl"

            def rows() -> list[dict[str, int]]:
                assert run.poll() in (None, 0)
                return [dict(row) for row in read_rounds(path)]

            wait_until(lambda: len(rows()) > 2, "no rounds")
            time.sleep(0.5)
            link.cut()
            cut_after = len(rows()) - 1
            wait_until(lambda: len(rows()) - 1 >= cut_after + 3, "the rounds stopped")
            link.up()
            assert run.wait(400) == 0
        for i in range(NODES):
            assert deployment.processes[node_name(i)].poll() is None, "no node was started again"
    found = rows()
    assert [row["round"] for row in found] == list(range(ROUNDS + 1))
    assert found[1]["replies"] == NODES
    assert min(row["replies"] for row in found[cut_after + 1 :]) == 2, "without those behind the link"
    assert found[-1]["replies"] == NODES, "and with them again"
    assert found[-1]["accuracy"] > 2 * found[1]["accuracy"]
    assert "goes on without node" in (path.parent / "flower.log").read_text()
