"""What a run's record says, without Flower."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from fedkit.report import Row, figures, read_rounds, tables


def rounds(accuracies: list[float], uplink: int = 100, fp32: int = 1000) -> list[Row]:
    """Return a run's rows: round 0, then one round per accuracy."""
    rows: list[Row] = [{"round": 0, "accuracy": 0.1}]
    for number, accuracy in enumerate(accuracies, start=1):
        sent = {"uplink-bytes": uplink, "downlink-bytes": 2 * uplink, "fp32-bytes": fp32}
        rows.append({"round": number, "accuracy": accuracy, "skips": 1, "seconds": 1.5 * number} | sent)
    return rows


def text_of(table: Table) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines))
    return path


def test_rounds_are_read_in_order_and_the_last_record_of_a_round_counts(tmp_path: Path) -> None:
    lines = [
        json.dumps({"round": number, "loss": loss}) for number, loss in [(0, 3.0), (2, 1.0), (1, 2.0), (2, 0.5)]
    ]
    rows = read_rounds(write(tmp_path / "rounds.jsonl", *lines))
    assert [(row["round"], row["loss"]) for row in rows] == [(0, 3.0), (1, 2.0), (2, 0.5)]


@pytest.mark.parametrize(
    "torn", ['{"round": 2, "acc', '{"round": 2, "acc{"round": 2}', "[1]", "7", "{}", '{"round": "1"}']
)
def test_a_line_that_is_no_record_is_skipped(tmp_path: Path, torn: str) -> None:
    assert [row["round"] for row in read_rounds(write(tmp_path / "r", '{"round": 1}', torn))] == [1]


def test_a_record_torn_inside_a_character_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "rounds.jsonl"
    path.write_bytes('{"round": 1}\n{"round": 2, "note": "é'.encode()[:-1])
    assert [row["round"] for row in read_rounds(path)] == [1]


def test_no_file_means_no_rounds_yet(tmp_path: Path) -> None:
    assert read_rounds(tmp_path / "absent") == []


def test_final_accuracy_is_the_mean_of_the_last_three_without_round_0() -> None:
    assert figures.final_value(rounds([0.2, 0.5, 0.6, 0.7]), "accuracy") == pytest.approx(0.6)
    assert figures.final_value(rounds([0.4]), "accuracy") == pytest.approx(0.4)
    assert figures.final_value([{"round": 0, "accuracy": 0.1}, {"round": 1}], "accuracy") is None


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (123_456_789, "123 MB"), (5e10, "50 GB")],
)
def test_bytes_are_shown_in_decimal_units(count: float, text: str) -> None:
    assert figures.format_bytes(count) == text


@pytest.mark.parametrize("length", [0, 1, 25, 26, 50, 51, 1000])
def test_a_long_table_is_thinned_out_and_keeps_its_ends(length: int) -> None:
    rows: list[Row] = [{"round": number} for number in range(length)]
    kept = tables.thin_out(rows)
    assert len(kept) <= tables.MAX_ROWS + 1
    assert kept[:1] == rows[:1]
    assert kept[-1:] == rows[-1:]
    assert length > tables.MAX_ROWS or kept == rows


def test_the_table_shows_savings_that_add_up_over_the_rounds_left_out() -> None:
    rows = rounds([0.5] * 60)
    rows[1] = {**rows[1], "uplink-bytes": 1000}
    last = text_of(tables.round_table(rows, "arm")).rstrip().splitlines()[-3]
    assert f"{60 * 1000 / (59 * 100 + 1000):.1f}x" in last


def test_missing_optional_keys_read_as_nothing() -> None:
    rows: list[Row] = [{"round": 0}, {"round": 1}]
    assert "-" in text_of(tables.round_table(rows, "arm"))
    assert "accuracy -" in tables.totals_line(rows)
    assert tables.totals_line([])


def test_rejected_replies_are_told_only_if_there_were_any() -> None:
    rows = rounds([0.5])
    assert "rejected" not in tables.totals_line(rows)
    assert "rejected 3 " in tables.totals_line([*rows, {"round": 2, "rejected": 3}])


def test_the_summary_compares_means_over_seeds() -> None:
    summary = figures.summarise(
        {"aquila": [rounds([0.5]), rounds([0.7])], "fedavg": [rounds([0.8], 1000), rounds([0.8], 1400)]},
        "fedavg",
    )
    aquila = summary["strategies"]["aquila"]
    assert aquila["seeds"] == 2
    assert aquila["accuracy-mean"] == pytest.approx(0.6)
    assert aquila["accuracy-std"] == pytest.approx(0.1 * 2**0.5)  # the sample's, not the population's
    assert (aquila["uplink-bytes"], aquila["downlink-bytes"]) == (100, 200)
    assert aquila["times-less-uplink-than-fp32"] == pytest.approx(10)
    assert aquila["times-less-uplink-than-fedavg"] == pytest.approx(12)
    assert summary["strategies"]["fedavg"]["times-less-uplink-than-fedavg"] == 1
    assert json.loads(json.dumps(summary)) == summary
    assert "0.6000 ± 0.1414" in text_of(tables.summary_table(summary))


def test_one_seed_has_no_deviation_and_a_silent_run_no_ratio() -> None:
    summary = figures.summarise({"silent": [[{"round": 0}, {"round": 1}]]})
    row = summary["strategies"]["silent"]
    assert row["accuracy-std"] is row["accuracy-mean"] is row["times-less-uplink-than-fp32"] is None
    assert "silent" in text_of(tables.summary_table(summary))


def test_the_report_says_who_was_missing_when_and_who_stood_in() -> None:
    rows: list[Row] = [{"round": k} for k in range(9)]
    for k, kin in ((2, {}), (3, {"1": "0"}), (4, {"1": "1"}), (7, {"1": "0"})):
        rows[k] = {"round": k, "missing-clients": ["1"], "stand-ins": kin}
    rows[4] = {"round": 4, "missing-clients": ["1", "3"], "stand-ins": {"1": "1"}}
    table = tables.missing_table(rows)
    assert table is not None
    lines = [" ".join(line.split()) for line in text_of(table).splitlines()]
    assert "│ 1 │ 4 │ 2-4, 7 │ client 0 2×, nobody 1×, its last update 1× │" in lines
    assert "│ 3 │ 1 │ 4 │ nobody 1× │" in lines
    assert tables.missing_table([{"round": 1}]) is None


def test_a_run_without_accuracy_is_judged_by_perplexity_or_loss() -> None:
    rows = [{"round": k, "perplexity": 30.0 / (k + 1), "loss": 3.0, "uplink-bytes": 100} for k in range(4)]
    assert "perplexity 7.5000" in tables.news(rows)
    assert "perplexity 11.0833 " in tables.totals_line([*rows[:3], {**rows[3], "perplexity": 8.25}])
    assert "perplexity" in text_of(tables.round_table(rows, "title"))
    summary = figures.summarise({"aquila": [rows]})
    assert summary["metric"] == "perplexity"
    assert "perplexity" in text_of(tables.summary_table(summary))
    assert "loss 3.0000" in tables.news([{"round": 1, "loss": 3.0}])
