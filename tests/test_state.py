"""A client's memory on its disk: what it outlives, and what happens where it cannot be kept."""

import os
import resource
from contextlib import contextmanager

import numpy as np
import pytest
from flwr.app import Context, RecordDict

from fedkit.clients import AquilaMod, ErrorFeedbackMod, SafariMod
from fedkit.errors import StateError
from fedkit.files import write_archive
from fedkit.message import to_arrays
from fedkit.rounds import RoundGrid
from fedkit.state import KEPT, STATE_DIR, ClientState
from fedkit.strategies import Aquila, ErrorFeedback, Safari
from tests.helpers.grid import InProcessGrid
from tests.helpers.quadratic import client_app, initial, targets

NUM = 4
EVERYBODY = {"fraction_evaluate": 0.0, "min_train_nodes": NUM, "min_available_nodes": NUM}
PAIRS = [(Aquila, AquilaMod), (ErrorFeedback, ErrorFeedbackMod), (Safari, SafariMod)]


def context(node_id=5, **config):
    return Context(run_id=1, node_id=node_id, node_config=config, state=RecordDict(), run_config={})


class Restarting(InProcessGrid):
    """After every answer, its SuperNode starts anew: with an empty Context, and under another node id."""

    def restart_all(self):
        self.apps = {node_id + 100: app for node_id, app in self.apps.items()}
        self.contexts = {
            node_id + 100: context(node_id + 100, **old.node_config) for node_id, old in self.contexts.items()
        }

    def get_node_ids(self):
        self.restart_all()
        return super().get_node_ids()


def train(make, mod, grid_type=InProcessGrid, rounds=5, tamper=lambda local: local, **config):
    grid = grid_type([client_app([mod()], target, tamper=tamper) for target in targets(NUM)])
    for old in grid.contexts.values():
        old.node_config.update(config)
    wrapped = RoundGrid(grid)
    result = make(**EVERYBODY).start(wrapped, initial(), num_rounds=rounds)
    return to_arrays(result.arrays) if result.arrays else None, wrapped


@pytest.mark.parametrize(("make", "mod"), PAIRS)
def test_a_supernode_that_restarts_after_every_round_changes_nothing(make, mod, tmp_path):
    steady, _ = train(make, mod)
    restarted, wrapped = train(make, mod, Restarting, **{"state-dir": str(tmp_path)})
    for name, array in steady.items():
        np.testing.assert_array_equal(array, restarted[name])
    assert wrapped.ledger.round_totals(5)["rejected"] == 0


@pytest.mark.parametrize(("make", "mod"), PAIRS)
def test_without_a_folder_it_starts_anew_and_the_run_goes_on(make, mod):
    restarted, wrapped = train(make, mod, Restarting)
    assert restarted is not None
    assert all(wrapped.ledger.round_totals(k)["replies"] == NUM for k in range(1, 6))


def test_the_environment_names_the_folder_too_and_the_node_config_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv(STATE_DIR, str(tmp_path / "environment"))
    one = ClientState(context(**{"partition-id": 3}), "experiment").path
    assert one == tmp_path / "environment" / "experiment" / "3.npz"
    two = ClientState(context(**{"client-id": "a", "state-dir": str(tmp_path / "node")}), "experiment").path
    assert two == tmp_path / "node" / "experiment" / "a.npz"


@pytest.mark.parametrize("place", ["disk", "context"])
def test_another_experiment_has_another_memory(place, tmp_path):
    node = context(**{"partition-id": 0} | ({"state-dir": str(tmp_path)} if place == "disk" else {}))
    ClientState(node, "one").save({"a": b"\0\1", "empty": b""})
    assert ClientState(node, "one").load() == {"a": b"\0\1", "empty": b""}
    assert ClientState(node, "two").load() == {}


@pytest.mark.parametrize("name", ["../../x", "a/b", "", "é", "x" * 300, ".", "..", "~", "a\0b"])
def test_no_name_leads_out_of_the_folder(name, tmp_path):
    node = context(**{"client-id": name, "state-dir": str(tmp_path / "state")})
    where = ClientState(node, name)
    where.save({"a": b"1"})
    assert where.load() == {"a": b"1"}
    (written,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written.parent.parent == tmp_path / "state"
    other = ClientState(context(**{"client-id": name + "'", "state-dir": str(tmp_path / "state")}), name)
    assert other.path != where.path


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"PK" * 99]
)
def test_a_damaged_file_is_a_client_without_memory(damage, tmp_path, caplog):
    where = ClientState(context(**{"state-dir": str(tmp_path)}), "one")
    where.save({"a": bytes(1000)})
    where.path.write_bytes(damage(where.path.read_bytes()))
    assert where.load() == {}
    assert "Starting anew" in caplog.text


@contextmanager
def files_up_to(size):
    """A disk that is full, as far as a process can tell: files cannot grow beyond `size` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_the_former_file(tmp_path):
    path = tmp_path / "file.npz"
    write_archive(path, {"a": np.arange(10)})
    with files_up_to(2000), pytest.raises(StateError, match=r"cannot write .*Free the disk"):
        write_archive(path, {"a": np.arange(10_000)})
    assert np.load(path)["a"].tolist() == list(range(10))
    assert list(tmp_path.iterdir()) == [path]


def test_a_client_that_cannot_write_says_so_before_it_trains(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    trained = []
    params, wrapped = train(
        ErrorFeedback, ErrorFeedbackMod, rounds=1, tamper=trained.append, **{"state-dir": str(tmp_path / "file")}
    )
    assert not any(array.any() for array in params.values())
    assert not trained
    assert wrapped.ledger.round_totals(1)["rejected"] == NUM
    assert "StateError: cannot write" in caplog.text


def test_a_server_that_cannot_write_says_so_before_anybody_is_asked(tmp_path):
    (tmp_path / "file").write_text("")
    wrapped = RoundGrid(InProcessGrid([client_app([ErrorFeedbackMod()], t) for t in targets(NUM)]))
    with pytest.raises(StateError, match="cannot"):
        ErrorFeedback(**EVERYBODY, checkpoint=tmp_path / "file" / "run").start(wrapped, initial(), num_rounds=1)
    full = ErrorFeedback(**EVERYBODY, checkpoint=tmp_path / "full")
    with files_up_to(300), pytest.raises(StateError, match="cannot write"):
        full.start(wrapped, initial(), num_rounds=1)
    assert not wrapped.ledger.entries


def test_files_of_old_experiments_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv(STATE_DIR, str(tmp_path))
    for number in range(KEPT + 5):
        state = ClientState(context(), f"e{number}")
        state.save({"value": b"x"})
        os.utime(state.path, (number, number))
        ClientState(context(6), f"e{number}" if number < 2 else "other").save({"value": b"y"})
    mine = sorted(path.parent.name for path in tmp_path.glob("*/5.npz"))
    assert mine == sorted(f"e{number}" for number in range(4, KEPT + 5))
    assert len(list(tmp_path.glob("*/6.npz"))) == 3, "another client's stay"
