"""Files that outlive a crash."""

import json

import numpy as np
import pytest

from fedkit import files
from fedkit.errors import StateError


def line(number, **more):
    return {"round": number, **more}


@pytest.mark.parametrize("torn", ["", '{"round": 2, "acc', '{"rou'])
def test_what_a_crash_tore_is_cut_off(tmp_path, torn):
    path = tmp_path / "rounds.jsonl"
    path.write_text('{"round": 0}\n{"round": 1}\n' + torn)
    files.put_line(path, line(2, loss=0.5), key="round")
    files.put_line(path, line(3), key="round")
    assert files.read_lines(path) == [line(0), line(1), line(2, loss=0.5), line(3)]


def test_a_line_replaces_its_former_self_and_what_came_after(tmp_path):
    path = tmp_path / "rounds.jsonl"
    files.append_lines(path, [line(number) for number in range(5)])
    files.put_line(path, line(3, again=True), key="round")
    assert files.read_lines(path) == [line(0), line(1), line(2), line(3, again=True)]
    assert path.read_text().endswith("\n")


def test_a_value_that_cannot_be_written_leaves_the_former_one(tmp_path):
    path = tmp_path / "plan.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [each.name for each in tmp_path.iterdir()] == ["plan.json"]


def test_an_archive_with_any_bit_flipped_is_read_or_is_a_state_error(tmp_path):
    path = tmp_path / "state.npz"
    files.write_archive(path, {"a": np.arange(5.0), "b": np.zeros((2, 3), np.float32)})
    good = path.read_bytes()
    refused = 0
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        try:
            files.read_archive(path)
        except StateError:
            refused += 1
    assert refused > len(good)
