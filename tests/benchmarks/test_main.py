"""The one entry point knows every benchmark, and runs what it is asked for."""

import json

import pytest

import benchmarks
from benchmarks.__main__ import benchmarks as known
from benchmarks.__main__ import main


def test_it_lists_every_benchmark_with_what_it_measures(capsys):
    assert main([]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed and what for name, what in known().items())
    assert {"codec", "aquila", "safari", "rm_lora", "text_lora", "round_time"} <= known().keys()
    documented = {name for name in known() if f"``{name}``" in (benchmarks.__doc__ or "")}
    assert documented >= {"codec", "aquila", "text_lora", "rm_lora", "wire"}


def test_it_hands_on_what_comes_after_the_dashes(tmp_path, capfd):
    assert main(["fuzz", "--out", str(tmp_path), "--", "--seconds", "0.2"]) == 0
    assert "=== fuzz" in capfd.readouterr().out


@pytest.mark.slow
def test_a_repeated_command_makes_its_table_from_the_rows(tmp_path):
    assert main(["aggregate", "--out", str(tmp_path), "--", "--clients", "3"]) == 0
    (row,) = map(json.loads, (tmp_path / "aggregate-small.jsonl").read_text().splitlines())
    assert row["clients"] == 3
    assert main(["aggregate", "--out", str(tmp_path), "--", "--clients", "3"]) == 0
    assert len((tmp_path / "aggregate-small.jsonl").read_text().splitlines()) == 1


def test_a_benchmark_that_fails_is_named_and_is_the_exit_status(tmp_path, capfd):
    assert main(["fuzz", "--out", str(tmp_path), "--", "--no-such-option"]) == 1
    assert "failed: fuzz" in capfd.readouterr().out
