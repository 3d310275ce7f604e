"""The command line up to the point where Flower would start."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedkit import cli
from fedkit.errors import ConfigError, LaunchError
from fedkit.plan import DRIVEN_KEYS, Arm, Plan, plan_arms, read_app, unused
from tests.helpers.superlink import FakeSuperLink

TINY_APP = Path(__file__).parent / "fixtures" / "tiny_app"


def plan(*options: str, out: str = "/out") -> list[Arm]:
    """Return the arms that these options stand for."""
    arguments = cli.build_parser().parse_args(["run", str(TINY_APP), *options])
    return plan_arms(arguments, read_app(TINY_APP)[1], Path(out))


def test_without_options_the_app_runs_once_as_it_is() -> None:
    (arm,) = plan()
    defaults = read_app(TINY_APP)[1]
    assert arm.config == defaults | {"run-dir": "/out/fedavg-seed0"}


def test_arms_are_strategies_times_seeds() -> None:
    arms = plan("--strategy", "aquila", "--compare", "fedavg", "--seeds", "2", "--run-config", "seed=5")
    assert [arm.run_dir.name for arm in arms] == [
        "aquila-seed5",
        "aquila-seed6",
        "fedavg-seed5",
        "fedavg-seed6",
    ]
    assert [arm.config["seed"] for arm in arms] == [5, 6, 5, 6]


def test_a_strategy_compared_with_itself_runs_once() -> None:
    assert len(plan("--compare", "fedavg")) == 1


def test_options_are_run_config_keys() -> None:
    (arm,) = plan("--drop", "0.5", "--rounds", "7", "--run-config", "num-clients=4", "round-seconds=1")
    assert [arm.config[key] for key in ("drop", "num-rounds", "num-clients")] == [0.5, 7, 4]


def test_options_of_the_strategy_are_checked_first_and_are_not_those_of_what_it_is_compared_with() -> None:
    options = ["--strategy", "error-feedback", "--compare", "fedavg", "--run-config"]
    arms = plan(*options, "strategy-options='rate=0.25 missing=\"mifa\"'")
    assert [arm.config["strategy-options"] for arm in arms] == ['rate=0.25 missing="mifa"', ""]
    with pytest.raises(ConfigError, match=r"'rat'\. Did you mean 'rate'"):
        plan(*options, "strategy-options='rat=0.25'")
    with pytest.raises(ConfigError, match="product: not with ErrorFeedback"):
        plan(*options, "strategy-options='lora=\"product\"'")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run-config", "num-round=3"], "'num-rounds'"),
        (["--run-config", "num-rounds='3'"], "expected int, got str '3'"),
        (["--run-config", "seed=true"], "expected int, got bool True"),
        (["--run-config", "run-dir='x'"], "--out"),
        (["--rounds", "0"], "num-rounds"),
        (["--drop", "1"], "drop"),
        (["--seeds", "0"], "--seeds"),
    ],
)
def test_what_can_never_work_is_refused(options: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(*options)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected the directory of a Flower App"),
        ("[project]\nname = 'x'\n", "does not describe a Flower App"),
        ("= 3", "does not describe a Flower App"),
        ("project.name = 'x'\n[tool.flwr.app.config]\nrun-dir = ''\n", "lacks 'strategy'"),
    ],
)
def test_what_is_no_app_is_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "pyproject.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_app(tmp_path)


def test_nested_tables_have_dotted_keys(tmp_path: Path) -> None:
    keys = "".join(f"{key} = 1\n" for key in DRIVEN_KEYS)
    text = f"project.name = 'x'\n[tool.flwr.app.config]\n{keys}[tool.flwr.app.config.lora]\nr = 4\n"
    (tmp_path / "pyproject.toml").write_text(text)
    assert read_app(tmp_path)[1]["lora.r"] == 4


def test_a_run_leaves_its_records(superlink: type[FakeSuperLink], tmp_path: Path) -> None:
    assert cli.main(["run", str(TINY_APP), "--compare", "aquila-published", "--out", "out"]) == 0
    record = json.loads((tmp_path / "out/aquila-published-seed0/run.json").read_text())
    assert record["status"] == "completed"
    assert record["run-config"] == superlink.configs[1]
    assert record["versions"].keys() == {"fedkit", "flwr", "python"}
    assert record["started"] <= record["finished"]
    assert superlink.settings["FEDKIT_STATE_DIR"] == str(tmp_path / "out/clients")
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["strategies"]["fedavg"]["times-less-uplink-than-aquila-published"] == 1


def test_the_default_out_names_the_app(superlink: type[FakeSuperLink], tmp_path: Path) -> None:
    assert cli.main(["run", str(TINY_APP)]) == 0
    (out,) = (tmp_path / "fedkit-runs").iterdir()
    assert out.name.startswith("tiny-app-2")


def test_nothing_is_overwritten(superlink: type[FakeSuperLink], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", str(TINY_APP), "--out", "out"]) == 0
    assert cli.main(["run", str(TINY_APP), "--out", "out"]) == 2
    error = capsys.readouterr().err
    assert "expected a new or an empty directory" in error
    assert "Traceback" not in error


def test_a_failed_run_ends_the_command_with_1(
    superlink: type[FakeSuperLink],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    superlink.ends[1] = LaunchError("it broke")
    assert cli.main(["run", str(TINY_APP), "--seeds", "2", "--out", "out"]) == 1
    assert capsys.readouterr().err == "fedkit: it broke\nTake it up with: fedkit resume out\n"
    assert json.loads((tmp_path / "out/fedavg-seed0/run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "out/fedavg-seed1").exists()


def test_at_a_superlink_of_flowers_config_the_server_has_a_folder_of_its_own(
    superlink: type[FakeSuperLink], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = []

    def connect(name: str) -> FakeSuperLink:
        names.append(name)
        return superlink(Path(), {})

    monkeypatch.setattr(cli, "Connection", connect)
    superlink.ends[2] = LaunchError("it broke")
    options = ["run", str(TINY_APP), "--superlink", "there", "--seeds", "2", "--out", "out"]
    assert cli.main(options) == 1
    assert cli.main(["resume", "out"]) == 0
    assert names == ["there", "there"]
    assert superlink.ran == ["fedavg-seed0", "fedavg-seed1", "fedavg-seed1"]
    folders = [str(config["run-dir"]) for config in superlink.configs]
    assert folders[1] == folders[2], "where the server finds its checkpoint"
    assert all(folder.startswith("out-") for folder in folders), "relative to a folder of the server"
    assert plan("--superlink", "there")[0].config["run-dir"] != plan("--superlink", "there")[0].config["run-dir"]
    assert Plan.load(tmp_path / "out").superlink == "there"


def test_two_runs_in_one_second_have_folders_of_their_own(tmp_path):
    folder = tmp_path / "app-20260131-120000"
    for name in ("app-20260131-120000", "app-20260131-120000-2", "app-20260131-120000-3"):
        found = unused(folder)
        assert found.name == name
        found.mkdir()


def test_all_keys_that_an_app_lacks_are_named_at_once(tmp_path):
    app = '[project]\nname = "a"\n[tool.flwr.app.config]\nseed = 0\nstrategy = "aquila"\n'
    (tmp_path / "pyproject.toml").write_text(app)
    with pytest.raises(ConfigError, match="lacks 'run-dir', 'num-rounds', 'num-clients', which"):
        read_app(tmp_path)


def test_several_strategies_are_compared_with_the_first() -> None:
    arms = plan("--strategy", "aquila", "--compare", "fedavg", "--compare", "safari")
    assert [arm.strategy for arm in arms] == ["aquila", "fedavg", "safari"]


def test_a_key_that_fedkit_knows_and_the_app_does_not_declare_is_told_where_to_declare(tmp_path: Path) -> None:
    arguments = cli.build_parser().parse_args(["run", str(TINY_APP), "--drop", "0.5"])
    defaults = {key: value for key, value in read_app(TINY_APP)[1].items() if key != "drop"}
    with pytest.raises(ConfigError, match=r"tool\.flwr\.app\.config.*drop = 0\.0"):
        plan_arms(arguments, defaults, tmp_path)
