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


def built(strategy, options=""):
    from fedkit.strategies import build

    return build(RunConfig(strategy=strategy, strategy_options=options))


def test_the_run_config_sets_options_of_the_strategy():
    ef = built("error-feedback", "rate=0.25 top-k=0.1 downlink-rate=0 missing='mifa' fraction-train=0.5")
    assert (ef.codec.quantizer.rate, ef.codec.sparsifier.density, ef.downlink.codec) == (0.25, 0.1, None)
    assert (ef.missing.by, ef.fraction_train) == ("mifa", 0.5)
    assert built("safari", "density=0.05 rewire=1").density == 0.05
    assert built("tac", "num-clusters=3 density=0.5 min-bits=4").codec.quantizer.min_bits == 4
    assert built("safari-drop", "lora='ffa' active-rank=2").parts.rows.mask.active_rank == 2
    assert built("qsgd", "bits=8").codec.quantizer.bits == 8
    assert built("fedavg", "fraction-evaluate=0.5").fraction_evaluate == 0.5


@pytest.mark.parametrize(
    ("strategy", "options", "message"),
    [
        ("safari", "densty=0.1", r"option of Safari 'densty'. Did you mean 'density'"),
        ("fedavg", "rate=0.5", r"unknown option of FedAvg 'rate'"),
        ("plain", "", r"unknown strategy 'plain'"),
        ("aquila", "top-k=0.5", "unknown option of Aquila 'top-k'"),
        ("safari", "density='much'", "density: expected float, got 'much'"),
        ("safari", "density=2.0", "density must be above 0"),
        ("aquila", "quantizer=8", "quantizer takes an object, and here goes by rate or min-bits"),
        ("error-feedback", "rate='half'", "expected float, got str"),
        ("error-feedback", "missing='invent'", "missing: expected 'drop'"),
        ("error-feedback", "lora='product'", "lora|product: not with ErrorFeedback"),
        ("aquila", "active-rank=2", "row_mask: not with Aquila"),
        ("tac", "density=0.5 lora='product'", "density: not with lora='product'"),
        ("tac", "rate=1.0 min-bits=2", "min-bits: expected one option for the quantizer, got two"),
        ("tac", "downlink-rate=1.0", "downlink: Tac sends each node other arrays"),
        ("error-feedback", "lora='fedsa'", "downlink: with lora='fedsa'"),
        ("error-feedback", "rate", "strategy-options: expected key=value"),
        ("error-feedback", "checkpoint='x'", "unknown option"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_the_nearest_or_the_reason(strategy, options, message):
    with pytest.raises(ConfigError, match=message):
        built(strategy, options)


def test_a_config_that_is_no_dataclass_is_told_so():
    class Config(RunConfig):
        lr: float = 0.1

    with pytest.raises(ConfigError, match=r"Config: its keys are no fields\. Put @dataclass"):
        parse(Config, {"lr": 0.2})
