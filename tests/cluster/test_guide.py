"""docs/kubeflow.md: its commands are valid shell, and the files, folders and options that it names exist."""

from __future__ import annotations

import re
import subprocess

import pytest

from pipeline.cli import main
from tests.cluster.test_manifests import MANIFESTS, OVERLAYS, PARTS
from tests.conftest import ROOT
from tests.helpers.guide import BLOCKS, COMMANDS, TEXT, lines
from tests.helpers.manifests import kustomize, needs_kubectl


def test_the_commands_are_valid_shell() -> None:
    assert len(BLOCKS) > 20 and len(COMMANDS) > 5
    for command in [*BLOCKS, *COMMANDS]:
        done = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), f"{command}: {done.stderr}"


def test_the_named_options_exist(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [part for line in lines("python -m pipeline") for part in re.split(r"[|;#]", line)]
    found = [re.match(r"\s*python -m pipeline (\w+)(.*)", part) for part in commands]
    used = {
        (match[1], option)
        for match in found
        if match
        for option in re.findall(r"--[\w-]+", match[2])
    }
    assert {match[1] for match in found if match} >= {"submit", "compile", "terminate"}
    for verb, option in used:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert re.search(rf"{option}\b", capsys.readouterr().out), f"{verb} {option}"


def test_the_named_files_exist() -> None:
    for path in re.findall(r"(?<![\w/])manifests/[\w./-]+\w", TEXT):
        if not path.startswith("manifests/kustomize"):  # in another repository
            assert (ROOT / path.replace("CLUSTER", "gke")).exists(), path
    for folder in re.findall(r"(?<![\w/])((?:components|node-pools)/[\w/-]+\w)", TEXT):
        assert (MANIFESTS / folder).is_dir(), folder
    named = set(re.findall(r"components/([\w-]+)", TEXT))
    assert {path.name for path in (MANIFESTS / "components").iterdir()} - named == set()
    for file in ("README.md", "training-operator/kustomization.yaml"):
        text = (MANIFESTS / file).read_text()
        for path in re.findall(r"(?<![\w/])manifests/[\w./-]+\w", text):
            assert (ROOT / path).exists(), f"{file}: {path}"


@needs_kubectl
def test_the_applied_folders_are_in_every_overlay() -> None:
    folders = {found for line in lines("kubectl") for found in re.findall(r"\$O(?:/\w+)?", line)}
    assert {"$O", "$O/trainjob", *(f"$O/{part}" for part in PARTS)} == folders
    for name in OVERLAYS:
        for folder in folders - ({"$O/dedicated"} if name == "kind" else set()):
            assert kustomize(MANIFESTS / "overlays" / name / folder.removeprefix("$O").strip("/"))
