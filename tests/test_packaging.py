"""What a user installs: the wheel made from the sdist, its files, and that it works away from the repository."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_every_source_once_and_nothing_else(wheel):
    shipped = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        f"fedkit/{'' if folder == 'fedkit' else folder + '/'}{path.relative_to(ROOT / folder).as_posix()}"
        for folder in ("fedkit", "strategies", "clients")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert shipped == expected


def test_the_wheel_works_from_elsewhere(wheel, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(wheel)!r})\n"
        "import fedkit, fedkit.strategies as s, fedkit.clients as c\n"
        f"assert fedkit.__file__.startswith({str(wheel)!r}) and s.__file__.startswith({str(wheel)!r})\n"
        "print(s.Aquila.__name__, c.AquilaMod.__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "Aquila AquilaMod\n", done.stderr
