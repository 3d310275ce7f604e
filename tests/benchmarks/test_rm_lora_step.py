"""Every arm of the step benchmark trains, and the first is plain LoRA."""

import pytest

from benchmarks.rm_lora_step import ARMS, stepper

TINY = {"hidden": 16, "layers": 1, "heads": 2, "image": 4, "patch": 2, "channels": 1, "batch": 2}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_makes_steps(arm):
    step = stepper(TINY, "cpu", ARMS[arm])
    assert step() >= 0
    assert step() >= 0


def test_the_first_arm_is_what_the_others_are_compared_with():
    assert next(iter(ARMS)) == "LoRA"
    assert ARMS["LoRA"] == {"active_rank": 8}
