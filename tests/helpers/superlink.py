"""What stands where Flower stands, up to the point where Flower would start."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from fedkit.config import Scalar
from fedkit.report import Row, read_rounds


def row(number: int, accuracy: float = 0.5) -> dict[str, Any]:
    """Return a round as a server records it."""
    counts = {"uplink-bytes": 10 * number, "downlink-bytes": 10, "fp32-bytes": 40}
    return {"round": number, "accuracy": accuracy, "seconds": 1.0} | counts


class FakeSuperLink:
    """Writes the rounds that are missing, 0 to 3; some calls end early. A test has its own subclass."""

    configs: ClassVar[list[Mapping[str, Scalar]]]  # of all calls
    ran: ClassVar[list[str]]  # the names of their folders
    ends: ClassVar[dict[int, BaseException]]  # by number of the call: what ends it, after its first two rounds
    settings: ClassVar[Mapping[str, str]]

    def __init_subclass__(cls) -> None:
        cls.configs, cls.ran, cls.ends, cls.settings = [], [], {}, {}

    def __init__(self, log: Path, settings: Mapping[str, str]) -> None:
        type(self).settings = settings

    def __enter__(self) -> FakeSuperLink:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def run(
        self, app_dir: Path, config: Mapping[str, Scalar], run_dir: Path, on_round: Callable[[Row], None]
    ) -> None:
        """Pretend to."""
        (run_dir / "flower.log").write_text(f"attempt {len(self.ran)}")
        self.configs.append(config)
        self.ran.append(run_dir.name)
        end = self.ends.get(len(self.ran))
        if config["strategy"] != "fedavg":
            (run_dir / "checkpoint.npz").touch()
        path = run_dir / "rounds.jsonl"
        for number in range(len(read_rounds(path)), 2 if end else 4):
            with path.open("a") as file:
                file.write(json.dumps(row(number)) + "\n")
            on_round(row(number))
        if end:
            raise end
