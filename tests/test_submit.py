"""Runs at a SuperLink that is not ours, with a program in place of `flwr` that answers as that does."""

from __future__ import annotations

import json
import os
import socket
import sys
import tomllib
from pathlib import Path

import pytest

from fedkit import submit
from fedkit.errors import LaunchError
from fedkit.ledger import ANNOUNCED
from fedkit.report import Row, read_rounds
from fedkit.submit import Connection, to_toml

FLWR = """
import json, pathlib, sys
here, command = pathlib.Path(__file__).parent, sys.argv[1]
script = json.loads((here / "script.json").read_text())
with (here / "calls").open("a") as file:
    file.write(command + "\\n")
answers = script[command]
number = (here / "calls").read_text().split().count(command) - 1
answer = answers[min(number, len(answers) - 1)]
print(answer if isinstance(answer, str) else json.dumps(answer))
"""
ACCEPTED = {"success": True, "run-id": "17"}
ROUND = ANNOUNCED + json.dumps({"round": 0})


def status(text: str, details: str = "") -> dict[str, object]:
    return {"success": True, "runs": [{"run-id": "17", "status": text, "status-details": details}]}


def error(text: str) -> dict[str, object]:
    return {"success": False, "error-message": text}


class Flwr:
    """What stands in place of `flwr`: a list of answers for each of its commands, the last one repeated."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "flwr.py").write_text(f"#!{sys.executable}\n{FLWR}")
        (folder / "flwr.py").chmod(0o755)
        self.answers(run=[ACCEPTED], log=[ROUND], ls=[status("finished:completed")])

    def answers(self, **commands: list[object]) -> None:
        path = self.folder / "script.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(before | commands))

    @property
    def calls(self) -> list[str]:
        return (self.folder / "calls").read_text().split()


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Flwr:
    monkeypatch.setattr(submit, "program", lambda name: str(tmp_path / f"{name}.py"))
    monkeypatch.setattr(submit, "AWAY_SECONDS", 3.0)
    return Flwr(tmp_path)


def run(folder: Path) -> list[Row]:
    seen: list[Row] = []
    (folder / "arm").mkdir(exist_ok=True)
    Connection("there").run(Path("app"), {"run-dir": "x", "seed": 3}, folder / "arm", seen.append)
    return seen


def test_a_run_is_submitted_followed_and_recorded(flwr: Flwr, tmp_path: Path) -> None:
    assert run(tmp_path) == [{"round": 0}]
    assert flwr.calls == ["run", "log", "ls"]
    assert read_rounds(tmp_path / "arm" / "rounds.jsonl") == [{"round": 0}]
    assert tomllib.loads((tmp_path / "arm" / "run-config.toml").read_text()) == {"run-dir": "x", "seed": 3}


def test_a_stream_that_breaks_off_is_opened_again(flwr: Flwr, tmp_path: Path) -> None:
    flwr.answers(log=[ROUND, f"{ROUND}\n{ANNOUNCED}" + json.dumps({"round": 1})])
    flwr.answers(ls=[status("running"), status("finished:completed")])
    assert run(tmp_path) == [{"round": 0}, {"round": 1}]
    assert flwr.calls == ["run", "log", "ls", "log", "ls"]


def test_a_superlink_that_is_away_for_a_while_is_waited_for(flwr: Flwr, tmp_path: Path) -> None:
    flwr.answers(ls=[error("connection refused"), "Traceback: nothing", status("finished:completed")])
    assert run(tmp_path)
    assert flwr.calls == ["run", "log", "ls", "ls", "ls"]


def test_a_superlink_that_stays_away_is_an_error_that_says_so(flwr: Flwr, tmp_path: Path) -> None:
    flwr.answers(ls=[error("connection refused")])
    with pytest.raises(LaunchError, match=r"cannot ask the SuperLink about run 17: .*connection refused"):
        run(tmp_path)


def test_a_run_that_is_refused_or_fails_is_an_error_with_the_reason(flwr: Flwr, tmp_path: Path) -> None:
    flwr.answers(ls=[status("finished:failed", "the server ended")])
    with pytest.raises(LaunchError, match=r"'finished:failed': the server ended"):
        run(tmp_path)
    flwr.answers(run=[error("no such app")])
    with pytest.raises(LaunchError, match="did not accept the app app:\nno such app"):
        run(tmp_path)


@pytest.mark.parametrize(
    ("state", "calls"),
    [
        ("running", ["ls", "log", "ls"]),
        ("finished:completed", ["ls", "log", "ls"]),
        ("finished:failed", ["ls", "run", "log", "ls"]),
        ("finished:stopped", ["ls", "run", "log", "ls"]),
        ("", ["ls", "run", "log", "ls"]),
    ],
)
def test_a_run_that_was_begun_is_found_again_unless_it_failed(
    flwr: Flwr, tmp_path: Path, state: str, calls: list[str]
) -> None:
    former = status(state) if state else error("Run ID not found")
    flwr.answers(ls=[former, status("finished:completed")])
    (tmp_path / "arm").mkdir()
    (tmp_path / "arm" / submit.RUN_ID).write_text("17")
    run(tmp_path)
    assert flwr.calls == calls


def test_an_interruption_leaves_the_run_and_says_how_to_stop_it(
    flwr: Flwr, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Connection, "check_alive", interrupt)
    with pytest.raises(KeyboardInterrupt) as caught:
        run(tmp_path)
    assert caught.value.__notes__ == ["The run goes on without this command. Stop it with: flwr stop 17 there"]
    assert (tmp_path / "arm" / submit.RUN_ID).read_text() == "17"


@pytest.mark.parametrize("value", [True, False, 0, -7, 1e-9, 0.5, "", 'a "b" = c\\', "line\nbreak", "größe"])
def test_values_survive_toml(value: bool | int | float | str) -> None:
    back = tomllib.loads(f"key = {to_toml(value)}")["key"]
    assert back == value
    assert type(back) is type(value)


def test_a_folder_that_is_called_as_the_superlink_is_not_taken_for_an_app(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Flower's own `flwr`: of ``flwr ls NAME`` it takes NAME for the folder of an app, if there is one."""
    with socket.socket() as port:
        port.bind(("127.0.0.1", 0))  # nobody listens
        address = f"127.0.0.1:{port.getsockname()[1]}"
        (tmp_path / "config.toml").write_text(f'[superlink.fedkit]\naddress = "{address}"\ninsecure = true\n')
        (tmp_path / "fedkit").mkdir()
        (tmp_path / "fedkit" / "pyproject.toml").write_text("[project]\nname = 'x'\n")
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(submit, "COMMAND_SECONDS", 20.0)
        connection = Connection("fedkit", {**os.environ, "FLWR_HOME": str(tmp_path)})
        answer = connection._command("ls", "fedkit", "--run-id", "1")
    assert "error-message" in answer
    assert "pyproject" not in answer["error-message"]
