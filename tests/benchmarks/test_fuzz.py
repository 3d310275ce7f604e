"""Hostile bytes by the million."""

import numpy as np
import pytest

from benchmarks.fuzz import MUTATIONS, Seed, Tally, fuzz, golden, judge, main, mutate


def test_a_hundred_mutants_end_in_codec_errors_or_arrays():
    tally = fuzz(0, 120, seed=7)
    assert not tally.failures
    assert tally.outcomes.total() == 120
    assert tally.outcomes["arrays"] > 0
    assert tally.outcomes["WireFormatError"] > 0


def test_every_golden_frame_is_judged_sound_as_it_is():
    tally = Tally()
    for seed in golden():
        judge(seed.frame, seed, tally, traced=True)
    assert tally.outcomes == {"arrays": len(golden())}
    assert 0 < tally.largest < 1


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutations_change_frames(mutation):
    frame = golden()[0].frame
    rng = np.random.default_rng(0)
    mutants = [bytearray(frame) for _ in range(20)]
    for mutant in mutants:
        mutation(mutant, rng, golden()[5].frame)
    assert sum(bytes(mutant) != frame for mutant in mutants) > 10
    assert mutate(golden()[0], frame, rng) != frame


def test_what_should_not_happen_is_a_failure():
    seed, tally = golden()[0], Tally()
    judge(seed.frame, Seed(seed.frame, {"like": seed.known["like"], "other": 1}), tally, traced=False)
    assert tally.outcomes["FAILED"] == 1
    assert "TypeError" in tally.failures[0]


@pytest.mark.slow
def test_a_minute_of_mutants(capsys):
    assert main(["--seconds", "60"]) == 0, capsys.readouterr()


@pytest.mark.slow
@pytest.mark.full
def test_a_million_mutants(capsys):
    assert main(["--full"]) == 0, capsys.readouterr()
