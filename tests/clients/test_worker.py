"""Laws of the worker that stays: the same replies, from one process; what dies costs its reply alone."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedkit.calls import is_alive, pack, send
from fedkit.clients import kept, worker
from fedkit.clients.worker import OURS, Worker, idle_seconds, key_of
from fedkit.errors import ConfigError
from fedkit.flower import deflate, superexec
from fedkit.message import from_arrays

APP = Path(__file__).parents[1] / "fixtures" / "warm_app"
NODE_ID = 2**63 + 11
RAISED, REFUSED = 2, 6  # Flower's codes


def message(do="", server_round=1, ttl=60.0, **config):
    content = {
        "arrays": from_arrays({"x": np.zeros((50, 4), np.float32)}),
        "config": ConfigRecord({"do": do, "server-round": server_round, **config}),
    }
    made = Message(RecordDict(content), dst_node_id=NODE_ID, message_type="train", ttl=ttl)
    made.metadata.__dict__["_message_id"] = f"message-{server_round}"
    return made


def context_of(run_id=1, **node_config):
    return Context(run_id, NODE_ID, {"partition-id": 0, **node_config}, RecordDict(), {"learning-rate": 0.1})


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    """The app as a ClientApp's process loads it, from a copy of its own."""
    root = shutil.copytree(APP, tmp_path_factory.mktemp("app") / "warm-app")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(root)
        yield __import__("warm_app.client_app").client_app.app
        for name in [name for name in sys.modules if name.partition(".")[0] == "warm_app"]:
            del sys.modules[name]


@pytest.fixture
def root(app):
    return Path(sys.modules["warm_app"].__file__).parents[1]


@pytest.fixture(scope="module")
def shared():
    """A node with an own folder for sockets, which the tests share that leave its worker alive."""
    folder = tempfile.mkdtemp(dir="/tmp")
    with pytest.MonkeyPatch.context() as patch, subprocess.Popen(["sleep", "600"]) as process:
        patch.setenv("XDG_RUNTIME_DIR", folder)
        yield process
        process.kill()
        process.wait()
    wait_until(lambda: not list(Path(folder, "fedkit").glob("*.sock")))  # the worker ends with its node
    shutil.rmtree(folder)


@pytest.fixture
def node(shared, monkeypatch):
    """Let this process be a ClientApp of the node."""
    monkeypatch.setattr(worker, "superexec", lambda: shared.pid)
    return shared


def folder():
    return Path(os.environ["XDG_RUNTIME_DIR"], "fedkit")


def metrics(reply):
    assert reply.has_content(), reply.error
    return reply.content["metrics"]


def pid_of(app, context=None):
    return metrics(app(message(), context or context_of()))["pid"]


def gone(pid):
    with suppress(ChildProcessError):  # it is this process's child, which a ClientApp's would not be for long
        os.waitpid(pid, os.WNOHANG)
    return not is_alive(pid)


def wait_until(done):
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_replies_and_contexts_are_those_without_a_worker_bit_for_bit(app, node, monkeypatch):
    def run():
        context, replies = context_of(), []
        for server_round in range(3):
            reply = app(message(server_round=server_round), context)
            for key in ("pid", "call", "chance"):
                del metrics(reply)[key]
            replies.append(
                (reply.metadata.reply_to_message_id, reply.metadata.dst_node_id, deflate_content(reply))
            )
        return replies, context

    warm, context = run()
    monkeypatch.setattr(worker, "superexec", lambda: None)
    cold, other = run()
    assert warm == cold
    assert context == other
    assert context.state["calls"]["so-far"] == 3


def deflate_content(reply):
    _, objects = deflate(Message(reply.content, dst_node_id=1, message_type="train"))
    return {data for data in objects.values() if not data.startswith(b"Message")}


def test_one_process_in_a_session_of_its_own_serves_all_messages(app, node):
    found = [metrics(app(message(), context_of())) for _ in range(3)]
    (pid,) = {report["pid"] for report in found}
    assert [b["call"] - a["call"] for a, b in pairwise(found)] == [1, 1]
    assert pid != os.getpid()
    assert os.getsid(pid) == pid


def test_nobody_else_can_reach_its_socket(app, node):
    pid_of(app)
    (path,) = folder().glob("*.sock")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder().stat().st_mode) == 0o700


def test_chance_is_that_of_a_new_process_whatever_a_message_seeded_before(app, node):
    context = context_of()
    draws = {metrics(app(message("seed" if i % 2 else ""), context))["chance"] for i in range(6)}
    assert len(draws) == 4  # three of new processes, one of the seed


def test_an_exception_comes_back_as_flowers_reply_and_the_worker_stays(app, node):
    pid, context = pid_of(app), context_of()
    error = app(message("raise"), context).error
    assert (error.code, error.reason) == (RAISED, "<class 'ZeroDivisionError'>:<'as it was told'>")
    assert context.state["calls"]["so-far"] == 1
    assert pid_of(app) == pid


def test_what_the_app_prints_comes_out_here_and_the_worker_holds_no_output_open(app, node, capfd):
    pid = pid_of(app)
    app(message("raise"), context_of())
    out, err = capfd.readouterr()
    assert out.count(f"in {pid}") == 2
    assert err.count("error of call") == 2
    assert "ZeroDivisionError: as it was told" in out + err
    if Path("/proc").exists():
        for _ in range(250):  # it lets go once the reply is sent
            held = {os.readlink(f"/proc/{pid}/fd/{number}") for number in range(3)}
            if held == {os.devnull}:
                break
            time.sleep(0.02)
        assert held == {os.devnull}


def test_two_calls_at_once_are_served_one_after_the_other(app, node):
    reports = []
    threads = [
        threading.Thread(target=lambda: reports.append(metrics(app(message("sleep", seconds=0.3), context_of()))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({report["pid"] for report in reports}) == 1
    assert len({report["call"] for report in reports}) == 3


def test_a_worker_that_dies_costs_its_reply_alone(app, node):
    pid, context = pid_of(app), context_of()
    error = app(message("die"), context).error
    assert error.code == REFUSED
    assert "was it killed, or out of memory?" in error.reason
    assert not context.state
    assert pid_of(app) != pid


def test_a_worker_that_hangs_ends_with_the_messages_time_to_live(app, node):
    pid, begin = pid_of(app), time.monotonic()
    error = app(message("sleep", seconds=600.0, ttl=0.5), context_of()).error
    assert "longer than 0.5 s" in error.reason
    assert time.monotonic() - begin < worker._GREETING_SECONDS
    wait_until(lambda: gone(pid))


def test_a_client_app_that_dies_takes_its_work_with_it(app, root, node):
    pid, context = pid_of(app), context_of()
    (path,) = folder().glob("*.sock")
    connection = Worker(path, key_of(node.pid, context, root), root, node.pid, 60.0).reach()
    socket.send_fds(connection, [OURS], [1, 2])
    send(connection, pack(message("sleep", seconds=600.0), context))
    time.sleep(0.1)
    assert is_alive(pid)
    connection.close()
    wait_until(lambda: gone(pid))
    assert pid_of(app) != pid


def test_changed_files_and_another_run_have_a_worker_of_their_own_and_end_the_former(app, root, node):
    pids = [pid_of(app)]
    module = root / "warm_app" / "client_app.py"
    module.write_text(module.read_text() + "\n# changed\n")
    pids.append(pid_of(app))
    pids.append(pid_of(app, context_of(run_id=2)))
    assert len(set(pids)) == 3
    wait_until(lambda: [gone(pid) for pid in pids] == [True, True, False])
    assert len(list(folder().glob("*.sock"))) == 1


def test_sockets_that_nobody_listens_at_are_removed(app, node):
    pid = pid_of(app)
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: gone(pid))
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder() / "ffff.sock"))
    assert pid_of(app) != pid
    assert len(list(folder().glob("*.sock"))) == 1


def test_an_idle_worker_ends(app, node):
    pid = pid_of(app, context_of(**{"worker-idle": 0.2, "partition-id": 1}, run_id=3))
    wait_until(lambda: gone(pid))
    assert not list(folder().glob("*.sock"))


@pytest.mark.parametrize("setting", ["node config", "environment", "simulation", "open folder", "long path"])
def test_without_a_worker_the_app_runs_here(app, node, monkeypatch, tmp_path, setting, caplog):
    context = context_of(**({"worker-idle": 0} if setting == "node config" else {}))
    if setting == "environment":
        monkeypatch.setenv(worker.WORKER_IDLE, "0")
    elif setting == "simulation":
        monkeypatch.setattr(worker, "superexec", superexec)
    elif setting == "open folder":
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
        (tmp_path / "fedkit").mkdir(mode=0o755)
    elif setting == "long path":
        (long := tmp_path / ("x" * 100)).mkdir()
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    assert pid_of(app, context) == os.getpid()
    assert len(caplog.records) == (setting in ("open folder", "long path"))


def test_what_is_kept_is_loaded_once_and_let_go_before_something_else_is():
    loaded, alive = [], weakref.WeakSet()

    class Model:
        pass

    def load(name, *, size=1):
        loaded.append((name, size, len(alive)))
        alive.add(model := Model())
        return model

    assert kept(load, "a") is kept(load, "a")
    assert kept(load, "a", size=2) is kept(load, "a", size=2)
    assert loaded == [("a", 1, 0), ("a", 2, 0)]


def test_only_a_client_app_of_a_deployment_has_a_superexec(monkeypatch):
    assert superexec() is None
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/flwr-clientapp", "--insecure"])
    assert superexec() == os.getppid()
    monkeypatch.setattr(sys, "path", ["/home/of/flwr/runtime-envs/17/lib/python3.11/site-packages"])
    assert superexec() is None


@pytest.mark.parametrize("said", ["soon", -1, "nan"])
def test_seconds_that_are_none_are_refused(said):
    with pytest.raises(ConfigError, match="worker-idle"):
        idle_seconds(context_of(**{"worker-idle": said}))
