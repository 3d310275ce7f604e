"""TLS and node authentication, as Flower has them: who is let in, who is not, and what Flower says to them.

The process of a SuperNode that is refused with "Exit Code: 305" ends with status 1, one whose signature is wrong
with status 0, and one that does not speak TLS tries again for ever unless told not to.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.certificates import certificates, node_key
from benchmarks.deployment import CONNECTED, NAME, SUPERLINK, Deployment, node_name
from benchmarks.processes import SECONDS
from fedkit.flower import FLEET_IS_GRPC
from fedkit.processes import free_port
from fedkit.report import read_rounds

TINY_APP = Path(__file__).parents[1] / "fixtures" / "tiny_app"
NODES, ROUNDS = 4, 4
NOT_ACTIVATED = "[code: 2004] Failed to activate SuperNode."  # also said to a second node with the same key
NOT_REGISTERED = "[code: 2001] SuperNode authentication is enabled. All SuperNodes must be registered via the CLI."
NO_TLS = "Socket closed" if FLEET_IS_GRPC else "Server disconnected without sending a response."

THIEF = """
import sys
from importlib import import_module
from pathlib import Path

from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

program = import_module("flwr.supernode.cli.flower_supernode")
mine, theirs = (Path(argument).read_bytes() for argument in sys.argv[1:3])
keys = load_ssh_private_key(mine, None), load_ssh_public_key(theirs)
program._try_setup_client_authentication = lambda arguments: keys
del sys.argv[1:3]
program.flower_supernode()
"""  # a SuperNode that shows a public key which is not that of its private one

pytestmark = [pytest.mark.deployment, pytest.mark.slow]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    with Deployment(tmp_path_factory.mktemp("security") / "deployment", nodes=NODES, secure=True) as deployment:
        yield deployment


def test_a_run_over_tls_with_known_nodes_learns_while_strangers_are_refused(
    deployment: Deployment, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    config = {"strategy": "aquila", "num-clients": NODES, "num-rounds": ROUNDS, "run-dir": str(run_dir)}
    run = deployment.submit(TINY_APP, config | {"round-seconds": 4.0})
    try:
        refused = start_strangers(deployment, tmp_path)
        for name, (process, message) in refused.items():
            assert process.wait(SECONDS) == 1, name
            assert "Exit Code: 305" in deployment.text(name), name
            assert message in deployment.text(name), name
            assert CONNECTED not in deployment.text(name), name
        assert run.poll() is None  # still under way
        run.wait(SECONDS)
    finally:
        run.kill()
    assert "exception: No SuperNode found with the given public key." in deployment.text(SUPERLINK)
    check_rounds(run_dir)


def start_strangers(deployment: Deployment, folder: Path) -> dict[str, tuple[subprocess.Popen[bytes], str]]:
    """Start SuperNodes that must be refused; return them and what is said to them, by name."""
    assert deployment.tls is not None
    known = deployment.keys[0]
    other_ca = certificates(folder).ca
    wrong_ca = [str(other_ca) if a == str(deployment.tls.ca) else a for a in deployment.node_arguments(known)]
    plain = ["--insecure", "--superlink", f"127.0.0.1:{deployment.fleet_port}", "--port", str(free_port())]
    strangers = {
        "unregistered": (deployment.node_arguments(node_key(folder / "stranger")), NOT_ACTIVATED),
        "no-key": (deployment.node_arguments(), NOT_REGISTERED),
        "key-in-use": (deployment.node_arguments(known), NOT_ACTIVATED),
        "other-authority": (wrong_ca, "SSL/TLS handshake error detected."),
        "plaintext": ([*plain, "--max-retries", "2"], NO_TLS),
    }
    return {
        name: (deployment.start("flower-supernode", name, *arguments), message)
        for name, (arguments, message) in strangers.items()
    }


def check_rounds(run_dir: Path) -> None:
    """Assert that every node answered in each round, that this taught the model, and what was sent."""
    rounds = read_rounds(run_dir / "rounds.jsonl")
    assert [row["round"] for row in rounds] == list(range(ROUNDS + 1))
    assert all(row["replies"] == row["asked"] == NODES for row in rounds[1:])
    assert rounds[-1]["loss"] < 0.2 * rounds[0]["loss"]
    entries = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    uplink = [entry for entry in entries if entry["direction"] == "uplink"]
    assert len(uplink) == NODES * ROUNDS
    assert sum(row["uplink-bytes"] for row in rounds) == sum(entry["object-bytes"] for entry in uplink)


def test_a_known_public_key_without_its_private_key_is_refused(deployment: Deployment, tmp_path: Path) -> None:
    mine, theirs = node_key(tmp_path / "thief"), deployment.keys[0].with_suffix(".pub")
    arguments = ["-c", THIEF, str(mine), str(theirs), *deployment.node_arguments(mine)]
    thief = deployment.start(Path(sys.executable).name, "thief", *arguments)
    assert thief.wait(SECONDS) == 0  # Flower takes a wrong signature for the wish that the node ends
    assert "SuperNode terminated gracefully." in deployment.text("thief")
    assert CONNECTED not in deployment.text("thief")


def test_a_node_can_be_registered_and_unregistered_while_the_superlink_runs(
    deployment: Deployment, tmp_path: Path
) -> None:
    key, name = node_key(tmp_path / "guest"), "guest"
    deployment.register(key, name)  # Flower's Control API asks for no credentials: who reaches its port may do it
    guest = deployment.start("flower-supernode", name, *deployment.node_arguments(key))
    deployment.wait_for(CONNECTED, 1, name)
    node_id = deployment.text(name).split(CONNECTED)[1].split()[0]
    deployment.flwr("supernode", "unregister", node_id, NAME)
    assert guest.wait(SECONDS) == 0
    again = deployment.start("flower-supernode", name, *deployment.node_arguments(key))
    assert again.wait(SECONDS) == 1
    assert NOT_ACTIVATED in deployment.text(name)
    assert all(deployment.processes[node_name(i)].poll() is None for i in range(NODES))


@pytest.mark.parametrize("trust", ["insecure = true", ""], ids=["plaintext", "without the authority"])
def test_the_program_flwr_is_refused_without_tls(deployment: Deployment, trust: str) -> None:
    config = deployment.home("flwr") / "config.toml"
    before = config.read_text()
    config.write_text(f'{before}\n[superlink.other]\naddress = "127.0.0.1:{deployment.port}"\n{trust}\n')
    try:
        with pytest.raises(subprocess.CalledProcessError) as refused:
            deployment.flwr("ls", "other")
    finally:
        config.write_text(before)
    assert "Connection to the SuperLink is unavailable." in refused.value.__notes__[0]
