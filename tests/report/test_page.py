"""The page about runs, without a browser; `test_browser.py` opens it in one."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fedkit import cli
from fedkit.errors import ConfigError
from fedkit.plan import Plan
from fedkit.report.axes import Axis
from fedkit.report.heat import MOST_COLUMNS, MOST_ROWS, cells_of, heat_map
from fedkit.report.page import page
from fedkit.report.reading import read_arms
from fedkit.report.series import group
from tests.helpers.runs import cluster_lines, write_json, write_lines, write_run

EVIL = "</title></script><script>alert('x')</script>\"'&"


class Elements(HTMLParser):
    """All elements of a page, and that each is closed."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.said: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.said.append(data)

    def count(self, tag: str, **attributes: str) -> int:
        wanted = {key.rstrip("_"): value for key, value in attributes.items()}
        return sum(name == tag and wanted.items() <= given.items() for name, given in self.found)


def headings(text: str) -> list[str]:
    return re.findall("<h2>(.*?)</h2>", text)


def test_the_page_has_all_that_a_run_left(tmp_path: Path) -> None:
    arms = write_run(tmp_path / "run")
    write_lines(arms[0] / "clusters.jsonl", cluster_lines(4, ["0", "1"]))
    text = page(read_arms([tmp_path / "run"]))
    sections = ["Summary", "Accuracy", "Traffic", "Clients", "Clusters", "Learning", "Ledger", "Settings"]
    assert headings(text) == sections
    for what in ("Effective rank of the adapters", "Adjusted Rand index", "less than fedavg", "client 0 1×"):
        assert what in text
    elements = Elements(text)
    assert elements.count("svg", role="img", class_="plot") == 3 + 2 + 5
    assert elements.count("input", type="range") == 1
    assert all(given.get("aria-label") for tag, given in elements.found if tag == "svg" and "role" in given)
    assert "Not finished" not in text


def test_the_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    text = page(read_arms([tmp_path / "run"]))
    assert not re.findall(r"https?:|@import|url\(|<link(?! rel=\"icon\" href=\"data:,\")", text)
    assert not [given for _, given in Elements(text).found if "src" in given]


def test_what_others_wrote_is_text_and_never_markup(tmp_path: Path) -> None:
    arms = write_run(tmp_path / "run", [EVIL.replace("/", "")], seeds=1, clients=["0", EVIL])
    write_lines(arms[0] / "clusters.jsonl", cluster_lines(2, [EVIL]))
    about = json.loads((arms[0] / "run.json").read_text())
    write_json(arms[0] / "run.json", about | {"app": EVIL, "git-commit": EVIL, "versions": {"flwr": EVIL}})
    elements = Elements(page(read_arms([tmp_path / "run"])))
    assert elements.count("script") == 1
    assert any("alert('x')" in said for said in elements.said)


def test_each_line_is_a_mean_over_seeds_and_each_band_goes_from_the_lowest_to_the_highest(tmp_path: Path) -> None:
    write_run(tmp_path / "run", seeds=3)
    aquila, fedavg = group(read_arms([tmp_path / "run"]))
    points = aquila.curve("accuracy")
    assert [(p.server_round, round(p.mean, 3), round(p.low, 3), round(p.high, 3)) for p in points[:2]] == [
        (0, 0.22, 0.2, 0.24),
        (1, 0.37, 0.35, 0.39),
    ]
    assert aquila.so_far("uplink-bytes") == {k: 400 * k for k in range(5)}
    assert fedavg.so_far("uplink-bytes", "downlink-bytes")[2] == 2 * (3600 + 1200)


def test_the_map_tells_skips_absences_and_refusals_and_calls_nodes_by_their_clients(tmp_path: Path) -> None:
    arms = write_run(tmp_path / "run")
    cells = cells_of(read_arms([arms[0]])[0])
    assert {client for client, _ in cells} == {"0", "1", "10", "2"}
    fates = {key: cell.fate for key, cell in cells.items() if cell.fate}
    assert fates == {
        ("1", 1): "skip",
        ("10", 2): "skip",
        ("2", 2): "missing",
        ("2", 3): "skip",
        ("0", 3): "rejected",
    }
    assert cells["2", 2].stand_in == "0"
    assert cells["1", 2].sent == 101
    text = page(read_arms([arms[0]]))
    assert "client 2, round 2: 0 B; no answer; client 0 stands in" in text
    assert text.index("client 2, round 1") < text.index("client 10, round 1")


def test_a_large_map_stays_small_enough_to_open(tmp_path: Path) -> None:
    arms = write_run(tmp_path / "run", ["aquila"], seeds=1, rounds=150, clients=[str(k) for k in range(100)])
    text = heat_map(read_arms(arms)[0])
    assert text is not None
    assert text.count("<rect") == 50 * 75 <= MOST_ROWS * MOST_COLUMNS
    assert "up to 2 clients and 2 rounds" in text


@pytest.mark.parametrize(
    ("status", "said"), [("running", "was stopped"), ("failed", "failed"), ("interrupted", "was interrupted")]
)
def test_a_run_that_is_not_finished_is_shown_as_such(tmp_path: Path, status: str, said: str) -> None:
    write_run(tmp_path / "run", seeds=1, status=status, rounds=2)
    text = page(read_arms([tmp_path / "run"]))
    assert f"aquila, seed 0 (run) {said}: 2 of 2 rounds." in text


def test_a_run_that_goes_on_is_running_and_what_was_not_begun_counts_nowhere(tmp_path: Path) -> None:
    arms = write_run(tmp_path / "run", ["aquila"], status="running")
    for path in arms[1].iterdir():
        path.unlink()
    with Plan.load(tmp_path / "run").locked():
        found = read_arms([tmp_path / "run"])
    assert [arm.status for arm in found] == ["running", "not begun"]
    assert len(group(found)[0].begun) == 1
    assert "Nothing yet." in page(found)


def test_torn_lines_and_damaged_files_cost_what_they_held_alone(tmp_path: Path) -> None:
    (arm, *_) = write_run(tmp_path / "run")
    for name in ("rounds.jsonl", "ledger.jsonl"):
        with (arm / name).open("a") as file:
            file.write('{"round": 9, "acc')
    (arm / "run.json").write_text("{")
    assert len(read_arms([tmp_path / "run"])[0].rows) == 5
    assert page(read_arms([tmp_path / "run"]))


def test_a_servers_folder_lends_its_ledger_to_the_run_that_was_submitted(tmp_path: Path) -> None:
    arms = write_run(tmp_path / "run", ["aquila"], seeds=1, superlink="lab")
    server = tmp_path / "server" / "run-77" / "aquila-seed0"
    server.mkdir(parents=True)
    for name in ("rounds.jsonl", "ledger.jsonl"):
        (server / name).write_bytes((arms[0] / name).read_bytes())
    (arms[0] / "ledger.jsonl").unlink()
    assert "FEDKIT_RUNS_DIR" in page(read_arms([tmp_path / "run"]))
    (alone,) = read_arms([server])
    assert (alone.title, alone.status) == ("aquila, seed 0", "")
    (arm,) = read_arms([tmp_path / "run", server.parent])
    assert arm.folder == arms[0]
    assert "FEDKIT_RUNS_DIR" not in page([arm])


def test_the_same_strategy_of_two_runs_is_told_apart_with_what_differs(tmp_path: Path) -> None:
    write_run(tmp_path / "one", ["aquila"])
    write_run(tmp_path / "two", ["aquila"], rounds=3)
    text = page(read_arms([tmp_path / "one", tmp_path / "two"]))
    assert "aquila (one)" in text
    assert "aquila (two)" in text
    assert re.search("What differs</caption>.*?num-rounds</th><td>4</td><td>3</td>", text)


def test_the_command_writes_the_page_into_the_run_or_where_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "run")
    assert cli.main(["report", str(tmp_path / "run")]) == 0
    assert cli.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "new" / "a.html")]) == 0
    assert (tmp_path / "run" / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (tmp_path / "new" / "a.html").exists()
    assert cli.main(["report", str(tmp_path / "new")]) == 2
    assert "expected the folder of a `fedkit run`" in capsys.readouterr().err
    with pytest.raises(ConfigError):
        read_arms([tmp_path / "nowhere"])


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [1e-9, 2e-9], [-5, 12], [0, 1e12], [0.17, 0.93]])
def test_an_axis_has_a_few_ticks_and_shows_every_value(values: list[float]) -> None:
    axis = Axis.over("", values, str)
    assert 2 <= len(axis.ticks()) <= 12
    assert all(-1e-9 <= axis.place(value) <= 1 + 1e-9 for value in [*values, *axis.ticks()])


@pytest.mark.parametrize("values", [[1.0], [900, 1100], [10, 1e9], [0.5, 3e6]])
def test_a_logarithmic_axis_does_too(values: list[float]) -> None:
    axis = Axis.logarithmic("", values, str)
    assert all(0 <= axis.place(value) <= 1 for value in [*values, *axis.ticks()])
    assert len(axis.ticks()) <= 12


def test_a_run_of_a_language_model_shows_its_perplexity(tmp_path: Path) -> None:
    for arm in write_run(tmp_path / "run"):
        rows = [json.loads(line) for line in (arm / "rounds.jsonl").read_text().splitlines()]
        for row in rows:
            row["perplexity"] = 20.0 - row.pop("accuracy")
        write_lines(arm / "rounds.jsonl", rows)
    text = page(list(read_arms([tmp_path / "run"])))
    assert "Perplexity against uplink bytes" in text
    assert "Down and to the left is better" in text
    assert "Accuracy" not in text
