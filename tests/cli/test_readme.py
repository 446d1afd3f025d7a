"""Code blocks of README.md, CONTRIBUTING.md and docs/: Python runs, commands parse or run."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import shutil
import socket
import subprocess
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from pipeline.cli import parser as pipeline_parser
from tests.conftest import ROOT, minimal, options
from vitdet.cli import main
from vitdet.cli import parser as vitdet_parser
from vitdet.config import load_config, recipes

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# (page, language, text) of each fenced block
BLOCKS = [
    (page.name, language, text)
    for page in PAGES
    for language, text in re.findall(r"^ *```(\w*)\n(.*?)^ *```", page.read_text(), re.S | re.M)
]
PYTHON = [text for _, language, text in BLOCKS if language == "python"]
PROGRAMS = {"vitdet": vitdet_parser, "pipeline": pipeline_parser}


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Return (program, arguments) of each `vitdet` and `python -m pipeline` command in a shell block."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        if not re.match(r"\s*vitdet |.*-m (vitdet|pipeline) ", line):
            continue
        words = shlex.split(line, comments=True)
        for start, word in enumerate(words):
            if word == "vitdet" and (start == 0 or words[start - 1] == "-m"):
                found.append(("vitdet", words[start + 1 :]))
            if words[start : start + 3] == ["python", "-m", "pipeline"]:
                found.append(("pipeline", words[start + 3 :]))
    return found


COMMANDS = [
    pytest.param(program, arguments, id=f"{page}: {program} {' '.join(arguments[:3])}")
    for page, language, text in BLOCKS
    if language in ("", "bash", "sh")
    for program, arguments in commands(text)
]


@pytest.mark.parametrize(("program", "arguments"), COMMANDS)
def test_commands_parse_and_settings_exist(program: str, arguments: list[str]) -> None:
    args = PROGRAMS[program]().parse_args(arguments)
    assert args.run
    load_config("tiny", getattr(args, "overrides", []))


def test_each_program_is_documented() -> None:
    assert {param.values[0] for param in COMMANDS} == {"vitdet", "pipeline"}


def test_the_readme_lists_every_recipe() -> None:
    table = re.findall(r"^\| `(\w+)`", (ROOT / "README.md").read_text(), re.M)
    assert set(recipes()) <= set(table)


def test_links_refer_to_existing_files_and_headings() -> None:
    links = [
        (page, *target.partition("#")[::2])
        for page in PAGES
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text())
        if not target.startswith("https://")
    ]
    assert len(links) > 10
    for page, name, heading in links:
        path = page.parent / name if name else page
        assert path.is_file(), f"{page.name}: {name}"
        titles = re.findall(r"^#+ (.*)", path.read_text(), re.M) if heading else []
        slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
        assert heading in ("", *slugs), f"{page.name}: {name}#{heading}"


def python_block(word: str) -> str:
    [found] = [text for text in PYTHON if word in text]
    return found


def test_the_prediction_example_runs(
    trained: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work/train").mkdir(parents=True)
    shutil.copy(trained / "model.pt", tmp_path / "work/train/model.pt")
    Image.open(picture).save(tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(python_block("Predictor.load").replace("threshold=0.5", "threshold=0"), names)
    assert len(names["found"].boxes) == len(names["found"].masks) > 0
    assert (tmp_path / "drawn.jpg").is_file()


def test_the_training_example_runs(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Run the block with the settings of `minimal` instead of the block's settings."""
    monkeypatch.chdir(tmp_path)
    small = load_config("tiny", minimal(tiny, optim__steps=2))
    monkeypatch.setattr("vitdet.config.load_config", lambda *_: small)
    names: dict[str, object] = {}
    exec(python_block("build_detector"), names)
    assert "box_ap" in capsys.readouterr().out
    losses = names["losses"]
    assert losses and all(key.startswith("loss_") for key in losses)
    assert all(loss.requires_grad for loss in losses.values())


def test_the_webhook_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    public = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("1.1.1.1", 0))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: public)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    exec(python_block("create_webhook"), {})
    [hook] = MlflowClient().list_webhooks()
    assert [str(event) for event in hook.events] == ["model_version_alias.created"]


def test_the_commands_for_own_data_run(
    own_tiny: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run each command of the README block that trains on a folder and draws detections on a photo."""
    [block] = [text for page, _, text in BLOCKS if page == "README.md" and "data check" in text]
    monkeypatch.chdir(tmp_path)
    Image.open(picture).save(tmp_path / "photo.jpg")
    own_tiny.rename(tmp_path / "ROOT")
    for _, arguments in commands(block):
        small = options(minimal(Path("ROOT"))) if arguments[0] == "train" else []
        with pytest.raises(SystemExit) as ended:
            main([*arguments, *small])
        assert not ended.value.code, arguments
    assert (tmp_path / "report.html").is_file() and (tmp_path / "drawn/photo.jpg").is_file()


def test_names_that_the_makefile_imports_exist() -> None:
    text = (ROOT / "Makefile").read_text()
    imports = re.findall(r"^from (vitdet[\w.]*) import (\w+)$", text, re.M)
    assert imports
    for module, name in imports:
        assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("repository", [False, True])
@pytest.mark.parametrize("jobs", ["-j1", "-j2"])
def test_the_demo_without_git_fails_before_it_installs_anything(
    tmp_path: Path, jobs: str, repository: bool
) -> None:
    """There is no .git, as in a ZIP of the sources, or if `repository`, a .git without a commit."""
    # without the variables of an outer make or of a Git hook
    outer = ("GIT_", "MAKEFLAGS", "MAKEFILES", "MAKELEVEL", "MFLAGS")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(outer)}
    environment |= {"GIT_CEILING_DIRECTORIES": str(tmp_path.parent), "LC_ALL": "C"}
    run = partial(subprocess.run, cwd=tmp_path, env=environment, text=True)
    names = ["Makefile", "pyproject.toml", "requirements.lock"]
    for name in names:
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ntouch "$(dirname "$0")/installed"\nexit 1\n')
    python.chmod(0o755)
    if repository:
        run(["git", "init", "--quiet"], check=True)
    done = run(["make", jobs, "demo", f"PYTHON={python}"], capture_output=True, timeout=60)
    assert done.returncode and "make demo needs a Git repository with a commit" in done.stderr
    assert "fatal: " in done.stderr  # Git's own message
    expected = {*names, "python", *([".git"] if repository else [])}
    assert {path.name for path in tmp_path.iterdir()} == expected
