"""docs/kubeflow.md: its commands are shell, and the files, values, options and sections that it names exist."""

from __future__ import annotations

import re
import subprocess
from itertools import pairwise

import pytest
import yaml

from pipeline.cli import main
from tests.cluster.test_manifests import MANIFESTS, OVERLAYS, PARTS
from tests.conftest import ROOT
from tests.helpers.guide import BLOCKS, CODE, COMMANDS, PROSE, TEXT, lines
from tests.helpers.manifests import kustomize, needs_kubectl

# Fields and variables of Kubernetes, its operators and Istio that the text names in code.
KUBERNETES = {
    "activeDeadlineSeconds",
    "authType",  # this and injectUserEnvVars: of Kubeflow Pipelines' MLflow plugin
    "fsGroup",
    "injectUserEnvVars",
    "matchLabelKeys",
    "podAffinity",
    "runtimePatches",
    "sizeLimit",
    "terminationGracePeriodSeconds",
}


def test_the_commands_are_shell() -> None:
    assert len(BLOCKS) > 20 and len(COMMANDS) > 5
    for command in [*BLOCKS, *COMMANDS]:
        done = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, ""), f"{command}: {done.stderr}"


def test_waiting_has_a_timeout() -> None:
    waiting = [line for verb in (" wait ", " rollout status ") for line in lines("kubectl", verb)]
    assert len(waiting) > 8
    assert [line for line in waiting if "--timeout=" not in line] == []


def test_steps_of_each_procedure_are_numbered_in_a_row() -> None:
    for section in re.split(r"(?m)^#+ ", TEXT):
        numbers = [int(number) for number in re.findall(r"(?m)^(\d+)\. ", section)]
        assert numbers == list(range(1, len(numbers) + 1)), section.split("\n")[0]


def test_tables_are_complete_and_links_lead_somewhere() -> None:
    rows = [line for line in TEXT.split("\n") if line.startswith("|")]
    assert len(rows) > 60
    for before, line in pairwise(TEXT.split("\n")):
        if before.startswith("|") and line.startswith("|"):
            assert line.count("|") == before.count("|"), line
    titles = re.findall(r"(?m)^#+ (.+)$", PROSE)
    anchors = {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", TEXT)) <= anchors


def test_the_pipeline_s_options_are_ones_that_it_has(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [part for line in lines("python -m pipeline") for part in re.split(r"[|;#]", line)]
    found = [re.match(r"\s*python -m pipeline (\w+)(.*)", part) for part in commands]
    used = {
        (match[1], option)
        for match in found
        if match
        for option in re.findall(r"--[\w-]+", match[2])
    }
    assert {match[1] for match in found if match} == {"submit", "compile", "terminate"}
    for verb, option in used:
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert re.search(rf"{option}\b", capsys.readouterr().out), f"{verb} {option}"


def test_the_values_that_it_names_exist() -> None:
    values = set()
    for name in OVERLAYS:
        file = MANIFESTS / "overlays" / name / "values" / "values.yaml"
        values |= yaml.safe_load(file.read_text())["data"].keys()
    named = {one.split(":")[0] for one in CODE if re.fullmatch(r"[a-z]+[A-Z]\w*(: [\w-]+)?", one)}
    assert {"waitSeconds", "storageClass", "mlflowNamespace"} <= named <= values | KUBERNETES


def test_the_files_that_it_names_exist() -> None:
    for path in re.findall(r"(?<![\w/])manifests/[\w./-]+\w", TEXT):
        if not path.startswith("manifests/kustomize"):  # of another repository
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
def test_the_folders_that_it_applies_are_in_every_overlay() -> None:
    folders = {found for line in lines("kubectl") for found in re.findall(r"\$O(?:/\w+)?", line)}
    assert {"$O", "$O/trainjob", *(f"$O/{part}" for part in PARTS)} == folders
    for name in OVERLAYS:
        for folder in folders - ({"$O/dedicated"} if name == "kind" else set()):
            assert kustomize(MANIFESTS / "overlays" / name / folder.removeprefix("$O").strip("/"))
