"""Files that outlive a crash."""

import json

import pytest

from fedkit import files


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
