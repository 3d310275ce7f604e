"""Rounds are followed in a file that a server writes, or in a log that is streamed."""

from __future__ import annotations

import json
from pathlib import Path

from fedkit.follow import LogFollower, RoundsFollower, log_tail
from fedkit.ledger import ANNOUNCED
from fedkit.report import Row, read_rounds


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def test_the_follower_reports_each_round_once(tmp_path: Path) -> None:
    seen: list[int] = []
    path = tmp_path / "rounds.jsonl"
    follower = RoundsFollower(path, lambda row: seen.append(row["round"]))
    follower.report()
    for text in ('{"round": 0}\n{"rou', 'nd": 1}\n', "", '{"round": 2}\n'):
        with path.open("a") as file:
            file.write(text)
        follower.report()
    assert seen == [0, 1, 2]


def test_the_follower_reports_what_is_recorded_from_now_on_or_anew(tmp_path: Path) -> None:
    seen: list[Row] = []
    path = write(tmp_path / "rounds.jsonl", '{"round": 0}', '{"round": 1, "loss": 5}')
    follower = RoundsFollower(path, seen.append)
    follower.report()
    assert seen == []
    write(tmp_path / "other", '{"round": 0}', '{"round": 1, "loss": 4}').replace(path)  # as long as before
    follower.report()
    assert seen == [{"round": 1, "loss": 4}]


def test_the_log_tail_is_the_last_traceback_without_colours(tmp_path: Path) -> None:
    log = write(tmp_path / "log", "Traceback (a)", "first", "Traceback (b)", "\x1b[91mlast\x1b[0m", "")
    assert log_tail(log) == "Traceback (b)\nlast"
    assert log_tail(write(tmp_path / "log", *map(str, range(100))), 2) == "98\n99"


def announced(number: int, **metrics: float) -> str:
    """Return a line of Flower's log."""
    return f"\x1b[92mINFO \x1b[0m:      {ANNOUNCED}{json.dumps({'round': number} | metrics)}\x1b[0m\n"


def test_rounds_that_are_announced_in_a_log_are_recorded_once(tmp_path: Path) -> None:
    seen: list[Row] = []
    log, path = tmp_path / "flower.log", tmp_path / "rounds.jsonl"
    follower = LogFollower(log, path, seen.append)
    follower.report()
    others = f"INFO: something else\nan app says {ANNOUNCED}hello\n{ANNOUNCED}[3]\n{ANNOUNCED}{{}}\n"
    text = announced(0) + others + announced(1, loss=5.0)
    for end in (10, len(announced(0)), len(text) - 5, len(text)):  # as it is streamed, piece by piece
        log.write_text(text[:end])
        follower.report()
    assert seen == read_rounds(path) == [{"round": 0}, {"round": 1, "loss": 5.0}]


def test_a_log_that_is_streamed_again_from_its_beginning_says_nothing_new(tmp_path: Path) -> None:
    seen: list[Row] = []
    log, path = tmp_path / "flower.log", tmp_path / "rounds.jsonl"
    log.write_text(announced(0) + announced(1) + announced(2))
    LogFollower(log, path, seen.append).report()
    follower = LogFollower(log, path, seen.append)  # of a command that was started again
    for text in (
        announced(0),
        announced(0) + announced(1),
        announced(0) + announced(1) + announced(2) + announced(3),
    ):
        log.write_text(text)
        follower.report()
    assert [row["round"] for row in seen] == [0, 1, 2, 3]
    assert [row["round"] for row in read_rounds(path)] == [0, 1, 2, 3]


def test_a_resumed_run_replaces_the_rounds_that_it_runs_again(tmp_path: Path) -> None:
    seen: list[Row] = []
    log, path = tmp_path / "flower.log", tmp_path / "rounds.jsonl"
    log.write_text("".join(announced(number, loss=1.0) for number in range(4)))
    LogFollower(log, path, seen.append).report()
    log.write_text(announced(2, loss=2.0))
    LogFollower(log, path, seen.append).report()
    assert [(row["round"], row["loss"]) for row in read_rounds(path)] == [(0, 1.0), (1, 1.0), (2, 2.0)]
