"""Python examples of the README run; its commands parse."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.cli import parser as pipeline_parser
from tests.conftest import ROOT, minimal
from vitdet.cli import parser as vitdet_parser

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", TEXT, re.S)
LOAD, TRAIN = (text for language, text in BLOCKS if language == "python")
# but for the synopsis
SHELL = [text for language, text in BLOCKS if not language and "[--set k=v]..." not in text]
LINES = "".join(SHELL).replace("\\\n", " ").splitlines()
COMMANDS = [
    line.split("  #")[0].split(" | ")[-1].strip()
    for line in LINES
    if re.match(r"vitdet |python -m pipeline |kubectl kustomize .* \| ", line)
]


def test_its_commands_are_found() -> None:
    assert len(COMMANDS) >= 12 and {command.split()[0] for command in COMMANDS} == {
        "vitdet",
        "python",
    }


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command.split()[:6]))
def test_a_command_is_one(command: str) -> None:
    program, *words = shlex.split(command)
    if program == "python":
        assert words[:2] == ["-m", "pipeline"] and pipeline_parser().parse_args(words[2:]).run
    else:
        assert vitdet_parser().parse_args(words).run


def test_a_checkpoint_in_two_lines(
    trained: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work/train").mkdir(parents=True)
    shutil.copy(trained / "model.pt", tmp_path / "work/train/model.pt")
    assert LOAD.count("picture.jpg") == 2 and LOAD.count("threshold=0.5") == 1
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    text = LOAD.replace("picture.jpg", picture.name).replace("threshold=0.5", "threshold=0")
    exec(text.replace("...", "seen = name"), names)
    assert names["seen"] in names["predictor"].class_names
    assert (tmp_path / "drawn.jpg").is_file() and len(names["found"].boxes) == len(
        names["found"].masks
    ) > 0


def test_training_from_python(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = '["optim.lr=1e-3", "train.batch_size=16"]'
    assert TRAIN.count(settings) == 1
    names: dict[str, object] = {}
    exec(TRAIN.replace(settings, repr(minimal(tiny, optim__steps=2))), names)
    assert "box_ap" in capsys.readouterr().out
    assert all(
        name.startswith("loss_") and loss.requires_grad for name, loss in names["losses"].items()
    )


# Without the variables of an outer make, and of Git, as in a hook
ENVIRONMENT = {
    key: value
    for key, value in os.environ.items()
    if not key.startswith("GIT_") and key not in ("MAKEFLAGS", "MAKEFILES", "MAKELEVEL", "MFLAGS")
}


@pytest.mark.parametrize("repository", [False, True])
@pytest.mark.parametrize("jobs", ["-j1", "-j2"])
def test_the_demo_without_git_says_so_before_it_installs_anything(
    tmp_path: Path, jobs: str, repository: bool
) -> None:
    """As from a ZIP of the repository, or in an image without .git; repository: one without a commit."""
    environment = {
        **ENVIRONMENT,
        "GIT_CEILING_DIRECTORIES": str(tmp_path.parent),
        "LC_ALL": "C",
    }
    names = ["Makefile", "pyproject.toml", "requirements.lock"]
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ntouch "$(dirname "$0")/installed"\nexit 1\n')
    python.chmod(0o755)
    if repository:
        subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, env=environment, check=True)
    done = subprocess.run(
        ["make", jobs, "demo", f"PYTHON={python}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode and "make demo needs a Git repository with a commit" in done.stderr
    assert "fatal: " in done.stderr  # Git's own message
    expected = {*names, "python", *([".git"] if repository else [])}
    assert {one.name for one in tmp_path.iterdir()} == expected
