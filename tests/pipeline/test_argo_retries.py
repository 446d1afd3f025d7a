"""Which steps Kubeflow Pipelines retries: the compiled pipeline with the defaults of versions 2.14 to 2.17.

tests/helpers/argo.py has the rules and their sources. A step's pod ends in one of three ways: with an exit code
of its container `main`; without an exit code, if it is removed before the controller sees it end ("pod deleted"); or
with the phase Failed and no container state, as the pod garbage collector sets them after the loss of a node
(kubernetes, pkg/controller/podgc/gc_controller.go, markFailedAndDeletePod).
"""

from __future__ import annotations

from functools import cache

import pytest
import yaml
from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineTaskSpec

from tests.conftest import ROOT
from tests.helpers import argo

SETTING = ROOT / "manifests" / "pipelines" / "workflow-defaults.yaml"
EXITED = {f"exit {code}": {"exit_codes": {"main": code, "wait": 0}} for code in (1, 137, 143)}
PODS = {
    **EXITED,
    "evicted": {"message": "The node was low on resource: memory.", "exit_codes": {}},
    "deleted": None,
    "node lost": {"exit_codes": {}},
}


@cache
def compiled() -> tuple[dict, dict]:
    text = (ROOT / "tests" / "golden_pipeline" / "pipeline.yaml").read_text()
    pipeline, platform = yaml.safe_load_all(text)
    return pipeline, platform


def defaults(version: str) -> dict:
    """Return spec.templateDefaults of this version's ConfigMap; "+": with manifests/pipelines."""
    if version.endswith("+"):
        text = yaml.safe_load(SETTING.read_text())["data"]["workflowDefaults"]
    else:
        text = argo.DEFAULTS_2_17 if version == "2.17" else "spec: {templateDefaults: {}}"
    return yaml.safe_load(text)["spec"]["templateDefaults"]


def run(version: str, step: str, pod: str, bad: int = 10**9, life: float = 0.0) -> argo.Run:
    """Simulate a run in which the first `bad` pods of a step end like PODS[pod]."""
    phase = argo.failed_reason(PODS[pod], argo.ARGO[version.rstrip("+")])
    made = argo.Run(
        argo.Compiler(*compiled()).templates,
        defaults(version),
        step,
        lambda attempt: phase if attempt < bad else "Succeeded",
        life,
    )
    made.phase = made.start()
    return made


def retries(step: str) -> int:
    """Return the maximum number of retries of a step in the compiled file."""
    (found,) = (
        dag["tasks"][step]["retryPolicy"]["maxRetryCount"]
        for part in (compiled()[0]["root"], *compiled()[0]["components"].values())
        if step in (dag := part.get("dag", {"tasks": {}}))["tasks"]
    )
    return found


OLD = ("2.14", "2.15", "2.16")
ALL = (*OLD, "2.17", "2.14+", "2.15+", "2.16+", "2.17+")
RETRIED = {
    **{(version, pod): version != "2.17" for version in ALL for pod in (*EXITED, "evicted")},
    **{(version, "deleted"): version not in OLD for version in ALL},
}


@pytest.mark.parametrize("step", ["train-job", "evaluate", "data"])
def test_retries_of_a_step_depend_on_the_servers_version(step: str) -> None:
    """2.17.0 retries no exit codes, earlier versions retry no deleted pods; the setting ("+") retries both."""
    found = {}
    for version, pod in RETRIED:
        once = run(version, step, pod, bad=1)
        found[version, pod] = (once.attempts, once.phase == "Succeeded")
    assert found == {
        case: (2, True) if retried else (1, False) for case, retried in RETRIED.items()
    }


@pytest.mark.parametrize("version", ALL)
def test_a_lost_node_may_be_taken_for_a_success(version: str) -> None:
    """Argo before 4 treats a failed pod without exit codes as succeeded."""
    once = run(version, "train-job", "node lost", bad=1)
    old = version.rstrip("+") in OLD
    assert (once.attempts, once.phase) == (
        (1, "Succeeded") if old else (2, "Succeeded") if version == "2.17+" else (1, "Failed")
    )


@pytest.mark.parametrize("version", [*OLD, "2.14+", "2.15+", "2.16+", "2.17+"])
@pytest.mark.parametrize("step", ["train-job", "gate"])
def test_a_step_that_keeps_failing_is_retried_up_to_its_limit(version: str, step: str) -> None:
    assert run(version, step, "exit 1").attempts == 1 + retries(step)
    deleted = 1 + retries(step) if version.endswith("+") else 1
    assert run(version, step, "deleted").attempts == deleted


def test_with_2_17_only_a_lost_step_restarts_the_enclosing_pipeline() -> None:
    """Each of the seven enclosing DAGs is run three times."""
    made = run("2.17", "train-job", "deleted")
    assert made.attempts == (1 + retries("train-job")) * 3**7
    assert run("2.17", "configs", "deleted").attempts == 3**5  # configs has no retries


def test_the_setting_does_not_retry_pipelines() -> None:
    """Steps without retries fail at once, with and without exit codes."""
    for pod in ("exit 1", "deleted"):
        assert run("2.17+", "configs", pod).attempts == 1


@pytest.mark.parametrize("version", ["2.16", "2.17+"])
def test_a_permanent_failure_is_reported_within_an_hour(version: str) -> None:
    """The time is the sum of the pauses between the attempts."""
    for step in ("announce", "data", "weights", "train-job", "evaluate", "gate", "compare"):
        assert 0 < run(version, step, "exit 1").clock <= 3600, step


def test_argos_pauses_grow_until_the_maximum_duration() -> None:
    """A pause lasts duration * factor^n; no retry starts after maxDuration."""

    def wait(factor: str, attempt: int, elapsed: float = 0.0, limit: str = "10") -> float | None:
        backoff = {"duration": "30", "factor": factor, "maxDuration": "3600"}
        return argo.Run.wait({"limit": limit, "backoff": backoff}, "Failed", attempt, elapsed)

    assert [wait("2", attempt) for attempt in range(1, 8)] == [30, 60, 120, 240, 480, 960, 1920]
    assert wait("2", 8) is None and wait("2", 7, 1700) is None
    assert {wait("1", attempt) for attempt in range(1, 11)} == {30}
    assert wait("1", 11) is None and wait("1", 11, limit="11") == 30


def test_a_compiled_pipeline_cannot_contain_the_retry_policy() -> None:
    """If a later kfp has a field for it, the pipeline should set the policy, not the cluster."""
    fields = PipelineTaskSpec.RetryPolicy.DESCRIPTOR.fields_by_name
    backoff = {"backoff_duration", "backoff_factor", "backoff_max_duration"}
    assert set(fields) == {"max_retry_count", *backoff}
    assert not [
        name for name in KubernetesExecutorConfig.DESCRIPTOR.fields_by_name if "retr" in name
    ]
