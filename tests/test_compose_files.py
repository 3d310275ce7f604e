"""The overlay of the compose demo: what it asks for is a run that fedkit understands."""

from pathlib import Path

import pytest

from fedkit.config import RunConfig, parse, parse_overrides
from fedkit.strategies import STRATEGIES

DOCKER = Path(__file__).parents[1] / "docker"
yaml = pytest.importorskip("yaml")


def test_the_overlay_lets_replies_of_some_nodes_be_lost():
    services = yaml.safe_load((DOCKER / "compose.yml").read_text())["services"]
    overlay = yaml.safe_load((DOCKER / "faults.yml").read_text())["services"]
    assert overlay.keys() <= services.keys()
    command = [text.replace("${ROUNDS:-10}", "10") for text in overlay["job"]["command"]]
    assert command[:5] == services["job"]["command"].split()[:5]
    assert command[5:8] == ["--strategy", "${STRATEGY:-safari}", "--run-config"]
    assert "safari" in STRATEGIES
    config = parse(RunConfig, parse_overrides(command[8:]))
    lost = {i: sum(config.schedule().loses(k, str(i)) for k in range(1, 1001)) for i in range(4)}
    assert min(lost[0], lost[1]) > 700
    assert 50 < max(lost[2], lost[3]) < 400
    assert not any(config.schedule().loses(k, str(i)) for k in (1, 2) for i in range(4))
