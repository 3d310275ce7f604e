from dataclasses import dataclass

import pytest

from fedkit.config import RunConfig, parse, parse_overrides
from fedkit.errors import ConfigError
from fedkit.faults import Faults


@dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    learning_rate: float = 0.1
    local_steps: int = 5


def test_kebab_case_keys_become_typed_fields():
    config = parse(Config, {"learning-rate": 1, "local-steps": 3, "strategy": "fedavg"})
    assert (config.learning_rate, config.local_steps, config.strategy) == (1.0, 3, "fedavg")
    assert isinstance(config.learning_rate, float)


def test_an_unknown_key_names_the_nearest_known_one():
    with pytest.raises(ConfigError, match=r"'lerning-rate'.*'learning-rate'"):
        parse(Config, {"lerning-rate": 0.1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"local-steps": 1.5}, "expected int, got float 1.5"),
        ({"local-steps": True}, "expected int, got bool"),
        ({"strategy": 3}, "expected str"),
        ({"num-rounds": 0}, "at least 1"),
        ({"num-clients": 0}, "at least 1"),
        ({"drop": 1.0}, "below 1"),
    ],
)
def test_values_that_can_never_work_are_refused(given, message):
    with pytest.raises(ConfigError, match=message):
        parse(Config, given)


def test_overrides_are_toml_pairs_with_quoted_blanks():
    given = parse_overrides(["a=1 b='x y'", 'c=true d=0.5 run-dir="/tmp/it\'s"'])
    assert given == {"a": 1, "b": "x y", "c": True, "d": 0.5, "run-dir": "/tmp/it's"}
    with pytest.raises(ConfigError, match="Quote strings"):
        parse_overrides(["strategy=fedavg"])


def test_a_fault_schedule_is_json_in_the_run_config():
    config = RunConfig(faults='{"bursts": {"begin": 0.1, "end": 0.5}, "duplicate": 0.2}', drop=0.3, seed=4)
    schedule = config.schedule(rates={"1": 0.5})
    assert (schedule.drop, schedule.duplicate, schedule.bursts.begin, dict(schedule.rates)) == (
        0.3,
        0.2,
        0.1,
        {"1": 0.5},
    )
    assert RunConfig(seed=4).schedule() == Faults(seed=4)
    with pytest.raises(ConfigError, match=r"faults: .*'dorp'"):
        RunConfig(faults='{"dorp": 0.1}')
