"""manifests/README.md: its commands are shell, and what they and the text name is there."""

from __future__ import annotations

import re
import subprocess
import textwrap

import pytest
import yaml

from pipeline.cli import main
from tests.cluster.test_manifests import MANIFESTS
from tests.conftest import ROOT

TEXT = (MANIFESTS / "README.md").read_text()
BLOCKS = [
    textwrap.dedent(block) for block in re.findall(r"(?ms)^ *(?:\d+\. )?```\n(.*?)^ *```", TEXT)
]
IN_LINE = [
    one.replace("\\|", "|") for one in re.findall(r"`((?:kubectl|python|\(kubectl)[^`]+)`", TEXT)
]


def test_the_commands_are_shell() -> None:
    assert len(BLOCKS) > 9 and len(IN_LINE) > 10
    for command in [*BLOCKS, *IN_LINE]:
        done = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), f"{command}: {done.stderr}"


def test_the_steps_are_numbered_in_one_row() -> None:
    numbers = [int(number) for number in re.findall(r"(?m)^(\d+)\. ", TEXT)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert {int(number) for number in re.findall(r"steps? (\d+)", TEXT)} <= {*numbers}


def test_the_pipeline_s_options_are_ones_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    words = re.sub(r"\s+", " ", " ; ".join([*BLOCKS, *IN_LINE]))
    found = re.findall(r"python -m pipeline (\w+)([^;|#]*)", words)
    assert {verb for verb, _ in found} == {"submit", "compile", "terminate"}
    options = [(verb, option) for verb, rest in found for option in re.findall(r"--[\w-]+", rest)]
    options += [
        ("submit", option) for option in re.findall(r"`(?:submit )?(--(?!from)[\w-]+)", TEXT)
    ]
    for verb, option in options:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert re.search(rf"{option}\b", capsys.readouterr().out), f"{verb} {option}"


def test_the_values_that_it_names_exist() -> None:
    values = yaml.safe_load(
        (MANIFESTS / "overlays" / "eks" / "values" / "values.yaml").read_text()
    )["data"]
    kubernetes = {
        "fsGroup",
        "activeDeadlineSeconds",
        "sizeLimit",
        "terminationGracePeriodSeconds",
        "ttlSecondsAfterFinished",
    }
    named = set(re.findall(r"`([a-z]+[A-Z]\w*)(?:: \w+)?`", TEXT)) - kubernetes
    assert {"waitSeconds", "storageClass", "podSecurity"} <= named <= values.keys()


def test_the_guide_names_files_that_exist() -> None:
    for guide in (MANIFESTS / "README.md", MANIFESTS / "training-operator" / "kustomization.yaml"):
        for path in re.findall(r"(?<![\w/])manifests/[\w./-]+\w", guide.read_text()):
            assert (ROOT / path).exists(), f"{guide.name}: {path}"
    text = (MANIFESTS / "README.md").read_text()
    for folder in re.findall(r"(?<![\w/])((?:components|overlays|node-pools)/[\w-]+)", text):
        assert (MANIFESTS / folder).exists() or folder == "overlays/CLUSTER", folder
    named = set(re.findall(r"`([\w-]+)`", text)) | set(re.findall(r"components/([\w-]+)", text))
    assert {path.name for path in (MANIFESTS / "components").iterdir()} - named == set()
