"""The wheel that users build: its files, its extras, and detection with it outside the sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytestmark = pytest.mark.slow
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "NOTICE")
# without the sources on sys.path
ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    shutil.copytree(
        ROOT / "vitdet", source / "vitdet", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", source, cwd=folder)
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_contains_every_file_of_the_package(wheel: Path) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "vitdet").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vitdet/")}
    assert found == expected


def test_the_wheel_installs_with_every_extra_and_detects(
    wheel: Path, trained: Path, picture: Path, tmp_path: Path
) -> None:
    """The new environment finds the dependencies through a .pth file; nothing is downloaded."""
    environment = tmp_path / "environment"
    venv.create(environment)
    python, program = environment / "bin/python", environment / "bin/vitdet"
    site = Path(
        run(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip()
    )
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")

    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", "--no-index", "--no-deps", "--force-reinstall", wheel, cwd=tmp_path)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = ",".join(project["optional-dependencies"])
    run(*pip, "install", "--no-index", f"vitdet[{extras}]=={project['version']}", cwd=tmp_path)

    where = run(python, "-c", "import vitdet; print(vitdet.__file__)", cwd=tmp_path).strip()
    assert Path(where) == site / "vitdet/__init__.py"
    run(program, "predict", trained / "model.pt", picture, "--output", "drawn", cwd=tmp_path)
    assert (tmp_path / "drawn" / f"{picture.stem}.jpg").is_file()
    run(program, "evaluate", trained, "--report", "report.html", cwd=tmp_path)
    assert "<style>" in (tmp_path / "report.html").read_text()
