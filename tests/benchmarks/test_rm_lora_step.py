"""Every arm of the step benchmark trains, and the first is plain LoRA."""

import pytest

from benchmarks.rm_lora_step import ARMS, operations, stepper

TINY = {"hidden": 16, "layers": 1, "heads": 2, "image": 4, "patch": 2, "channels": 1, "batch": 2}


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_makes_steps(arm):
    step = stepper(TINY, "cpu", ARMS[arm])
    assert step() >= 0
    assert step() >= 0


def test_the_first_arm_is_what_the_others_are_compared_with():
    assert next(iter(ARMS)) == "LoRA"
    assert ARMS["LoRA"] == {"active_rank": 8}


@pytest.mark.parametrize(("arm", "most"), [("mask", 4), ("penalty", 10), ("RM-LoRA", 14), ("RM-LoRA, strict", 22)])
def test_a_step_adds_the_same_few_operations_however_many_layers_there_are(arm, most):
    added = [
        operations(stepper(TINY | {"layers": layers}, "cpu", ARMS[arm]))
        - operations(stepper(TINY | {"layers": layers}, "cpu", ARMS["LoRA"]))
        for layers in (1, 6)
    ]
    assert added[0] == added[1] <= most
