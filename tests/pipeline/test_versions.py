"""Fields of a pipeline that an older server does not support are omitted, rejected or reported."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import yaml

from pipeline.versions import FIELDS, NEWEST, fit, occurrences, read_version, server_version
from tests.conftest import ROOT
from tests.helpers.kubeflow import Kubeflow, Run

GOLDEN = ROOT / "tests" / "golden_pipeline" / "pipeline.yaml"
JOB = ROOT / "tests" / "golden_pipeline" / "jobs.yaml"
SECURITY = {"securityContext"}
EXECUTORS = "platforms kubernetes deploymentSpec executors".split()


@pytest.fixture(autouse=True)
def recipes_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.cli.submit.check_recipes", lambda *_: True)


def documents() -> list[dict]:
    return list(yaml.safe_load_all(GOLDEN.read_text()))


def executors(platform: dict) -> dict[str, dict]:
    for key in EXECUTORS:
        platform = platform[key]
    return platform


def sent(kubeflow: Kubeflow) -> list[dict]:
    body = kubeflow.bodies("POST /runs")[-1]["pipeline_spec"]
    return [body["pipeline_spec"], body["platform_spec"]]


@pytest.mark.parametrize(
    ("version", "left_out"),
    [
        ("2.14", {"taskConfigPassthroughs", "TASK_CONFIG", "optional", *SECURITY}),
        ("v2.15.0", SECURITY),
        ("2.16.1", set()),
        ("2.17.0", set()),
    ],
)
def test_a_server_gets_the_fields_that_it_supports(version: str, left_out: set[str]) -> None:
    fitted, before = documents(), documents()
    lines = fit(fitted, read_version(version))
    assert {line.split(" does not support ")[1].split(" ")[0] for line in lines} == left_out
    for field in FIELDS:
        found = [place for document in fitted for place in occurrences(document, field)]
        assert not found or read_version(version) >= field.since
    assert (fitted == before) == (not left_out)
    # nothing else has changed
    spec, platform = fitted
    assert spec["deploymentSpec"] == before[0]["deploymentSpec"]
    for name, executor in executors(platform).items():
        assert executor["pvcMount"] == executors(before[1])[name]["pvcMount"]


def test_a_missing_field_that_changes_the_result_is_an_error() -> None:
    spec, platform = documents()
    executors(platform)["exec-data"]["pvcMount"][0]["subPath"] = "team"
    text = r"^the pipeline uses subPath, which Pipelines 2\.15\.0 does not support .*2\.16\.0 or later$"
    with pytest.raises(ValueError, match=text):
        fit([spec, copy.deepcopy(platform)], read_version("2.15"))
    assert fit([spec, platform], NEWEST) == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("1.8.5", "1.8.5 is too old; supported: 2.14.0, 2.15.0 (Kubeflow 1.11)"),
        # without the status of an exit handler's run (taskFinalStatus) and dsl.Collected
        ("2.5.0", "2.5.0 is too old; supported: 2.14.0, "),
        ("3.0", "3.0 is newer than this client supports; supported: "),
        ("newest", "version 'newest' of Kubeflow Pipelines: expected one of 2.14.0, 2.15.0 ("),
    ],
)
def test_an_unsupported_version_is_a_usage_error(
    kubeflow: Kubeflow, cli: Run, given: str, said: str, tmp_path: Path
) -> None:
    for words in (["compile", tmp_path / "p.yaml"], ["submit", "tiny"]):
        code, out, line = cli(*words, "--kfp", given)
        assert (code, out) == (2, "") and said in line.splitlines()[-1]
    assert not kubeflow.requests and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("health", "version", "doubt"),
    [
        ({"tag_name": "2.16.1"}, (2, 16, 1), ""),
        ({"apiServerTagName": "2.17.0", "frontendTagName": "2.5.0"}, (2, 17, 0), ""),
        ({"tag_name": "2.18.0"}, NEWEST, "the server runs Pipelines 2.18.0; treated as 2.17.0"),
        # as images before 2.16 report it, directly and through the web interface
        ({"tag_name": "unknown", "pipeline_store": "database"}, (2, 15, 0), "Pipelines 2.15.0 ("),
        ({"apiServerTagName": "unknown", "pipelineStore": "database"}, (2, 15, 0), "2.15.0 ("),
    ],
)
def test_the_health_response_gives_the_version(health: dict, version: tuple, doubt: str) -> None:
    found, remark = server_version(health)
    assert found == version and doubt in remark and bool(doubt) == bool(remark)


def test_submit_omits_unsupported_fields(kubeflow: Kubeflow, cli: Run) -> None:
    words = ["submit", "tiny", "--package", GOLDEN]
    assert cli(*words)[2] == ""
    assert "securityContext" in executors(sent(kubeflow)[1])["exec-data"]
    kubeflow.health = {"tag_name": "unknown", "pipeline_store": "database"}
    code, _, said = cli(*words)
    doubt, line = said.splitlines()
    assert code == 0 and "treated as Pipelines 2.15.0 (Kubeflow 1.11); pass --kfp" in doubt
    assert "securityContext (2.16.0 does); left out" in line and "Pod Security `restricted`" in line
    assert not any(
        "securityContext" in executor for executor in executors(sent(kubeflow)[1]).values()
    )
    # a version given by the user is used unchanged
    code, _, said = cli(*words, "--kfp", "2.16.1")
    assert (code, said) == (0, "") and "securityContext" in str(sent(kubeflow)[1])
    for health, problem in (
        ({"tag_name": "2.4.1"}, "2.4.1 is too old"),
        ({"tag_name": "unknown"}, "older than 2.14.0, the oldest supported version"),
    ):
        kubeflow.health = health
        code, _, said = cli(*words)
        assert code == 1 and problem in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("health", "said"),
    [
        (
            {"tag_name": "2.15.0"},
            "this is Pipelines 2.15.0; it does not support securityContext in the pipeline: use --kfp 2.15.0",
        ),
        (
            {"tag_name": "unknown", "pipeline_store": "database"},
            "the server does not support securityContext in the pipeline: pass the server's version with --kfp; it is "
            "older than 2.16.0",
        ),
        (
            {"tag_name": "unknown"},  # as Pipelines 2.5
            "the server does not support securityContext in the pipeline: pass the server's version with --kfp; it is "
            "older than 2.16.0",
        ),
    ],
)
def test_a_rejected_field_is_not_an_outage(
    kubeflow: Kubeflow, cli: Run, health: dict, said: str
) -> None:
    kubeflow.health, kubeflow.unknown = health, "securityContext"
    code, out, line = cli("submit", "tiny", "--package", GOLDEN, "--kfp", "2.17")
    assert (code, out, line) == (1, "", f"pipeline: {kubeflow.url}: {said}\n")
    assert kubeflow.words().count("POST /runs") == 1
    kubeflow.unknown = "schemaVersion"  # not in FIELDS
    line = cli("submit", "tiny", "--package", GOLDEN, "--kfp", "2.17")[2]
    assert line.endswith("the pipeline was compiled with a newer kfp than the server supports\n")


def test_compile_omits_fields_that_a_version_does_not_support(
    cli: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    newest, old = tmp_path / "newest.yaml", tmp_path / "old.yaml"
    monkeypatch.setattr("sys.stdin", io.StringIO(JOB.read_text()))
    code, out, said = cli("compile", newest, "--job", "-")
    assert (code, out, said) == (0, f"{newest}\n", "")
    code, out, said = cli("compile", old, "--job", JOB, "--kfp", "2.15")
    assert code == 0 and len(said.splitlines()) == 1 and "securityContext" in said
    spec, platform = yaml.safe_load_all(newest.read_text())
    for executor in executors(platform).values():
        del executor["securityContext"]
    assert list(yaml.safe_load_all(old.read_text())) == [spec, platform]
    head = [line for line in newest.read_text().splitlines() if line.startswith("#")]
    assert old.read_text().splitlines()[: len(head)] == head
