"""Every arm of the GPU benchmark trains to about the same loss, on whatever device there is."""

import pytest

from benchmarks.gpu import ARMS, measure


def test_the_arms_differ_in_time_alone():
    rows = [measure(arm, "tiny", 8) for arm in ARMS]
    assert all(row["milliseconds"] > 0 and row["frame"] > 0 for row in rows)
    assert [row["loss"] for row in rows[1:]] == pytest.approx([rows[0]["loss"]] * 2, rel=0.02)
