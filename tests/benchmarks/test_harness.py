"""The harness: what was measured is not measured again; what is not installed is a row."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from benchmarks.harness import MISSING, Bench, NotInstalledError, parser
from benchmarks.machine import commit, machine, peak_rise, side_by_side, status_bytes
from benchmarks.peers.base import require


def bench(folder, *options):
    return Bench("toy", parser(None).parse_args(["--out", str(folder), *options]))


def test_a_repeated_command_continues(tmp_path):
    assert bench(tmp_path).arm("a", lambda: {"bits": 1.0}, knob=2)["bits"] == 1.0
    assert bench(tmp_path).arm("a", lambda: pytest.fail("measured again"), knob=2)["bits"] == 1.0


def test_other_parameters_are_another_arm(tmp_path):
    bench(tmp_path).arm("a", lambda: {"bits": 1.0}, knob=2)
    assert bench(tmp_path).arm("a", lambda: {"bits": 3.0}, knob=4)["bits"] == 3.0
    assert bench(tmp_path, "--full").arm("a", lambda: {"bits": 5.0}, knob=2)["bits"] == 5.0


def test_a_row_is_in_the_file_as_soon_as_its_arm_is_done(tmp_path):
    first = bench(tmp_path)
    first.arm("a", lambda: {"bits": 1.0})
    with pytest.raises(ZeroDivisionError):
        first.arm("b", lambda: {"bits": 1 / 0})
    (row,) = map(json.loads, first.path.read_text().splitlines())
    assert row["arm"] == "a"
    assert row["machine"]["cores"] >= 1
    assert row["commit"] == commit()


def test_fresh_starts_over(tmp_path):
    bench(tmp_path).arm("a", lambda: {"bits": 1.0})
    assert bench(tmp_path, "--fresh").arm("a", lambda: {"bits": 2.0})["bits"] == 2.0


def test_json_is_the_table_as_data(tmp_path):
    run = bench(tmp_path, "--json", str(tmp_path / "rows.json"))
    run.arm("a", lambda: {"bits": 1.0})
    run.finish()
    assert json.loads((tmp_path / "rows.json").read_text()) == run.rows


def test_what_is_not_installed_is_a_row_and_is_tried_again(tmp_path, capsys):
    run = bench(tmp_path)
    row = run.arm("a", lambda: require("no_such_module", "no-such-package"))
    run.table("toys", {"arm": "toy", "bits": "bits"}, [row])
    assert "not installed: pip install no-such-package" in capsys.readouterr().out
    again = bench(tmp_path).arm("a", lambda: {"bits": 1.0})
    assert MISSING not in again
    assert bench(tmp_path).arm("a", lambda: pytest.fail("measured again")) == again


def test_require_says_what_to_install():
    with pytest.raises(NotInstalledError, match="pip install no-such-package"):
        require("no_such_module", "no-such-package")


def test_arms_take_turns():
    order = []
    seconds = side_by_side({"a": lambda: order.append("a"), "b": lambda: time.sleep(0.01)}, repeats=3)
    assert order == ["a"] * 3
    assert seconds["a"] < 0.01 <= seconds["b"]


def test_the_rise_of_peak_memory_is_that_of_the_run():
    megabytes = 40
    rise = peak_rise(lambda: np.ones(megabytes * 2**20, np.uint8)) / 2**20
    assert megabytes - 2 < rise < megabytes + 8


def test_the_machine_is_named():
    assert {"cpu", "cores", "python", "numpy"} <= set(machine())


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="not Linux")
def test_the_peak_of_a_process_is_not_that_of_who_started_it():
    mine = b"x" * 200_000_000
    child = [sys.executable, "-c", "from benchmarks.machine import status_bytes; print(status_bytes('VmHWM'))"]
    peak = int(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
    assert 5e6 < peak < len(mine) < status_bytes("VmHWM")
    assert status_bytes("VmRSS", 2**22 + 1) == 0, "no such process"
