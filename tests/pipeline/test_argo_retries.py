"""Which steps Kubeflow Pipelines runs again: the compiled pipeline under the defaults of 2.14 to 2.17.

tests/helpers/argo.py has the rules and their sources. What a step's pod leaves: an exit code of the container `main`; nothing,
where it is removed before the controller saw it end (an eviction, a node that is gone: "pod deleted"); or the phase
Failed of a pod whose containers never ended, as the pod garbage collector sets it for a lost node (kubernetes,
pkg/controller/podgc/gc_controller.go, markFailedAndDeletePod).
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
    """spec.templateDefaults of the ConfigMap of this version, "+" with manifests/pipelines."""
    if version.endswith("+"):
        text = yaml.safe_load(SETTING.read_text())["data"]["workflowDefaults"]
    else:
        text = argo.DEFAULTS_2_17 if version == "2.17" else "spec: {templateDefaults: {}}"
    return yaml.safe_load(text)["spec"]["templateDefaults"]


def run(version: str, step: str, pod: str, bad: int = 10**9, life: float = 0.0) -> argo.Run:
    """A run whose step's first `bad` pods end like this."""
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
    """The step's own, of the compiled file."""
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
def test_whether_a_step_is_retried(step: str) -> None:
    """2.17.0 retries no exit code, those before no deleted pod; with the setting ("+") each one both."""
    found = {}
    for version, pod in RETRIED:
        once = run(version, step, pod, bad=1)
        found[version, pod] = (once.attempts, once.phase == "Succeeded")
    assert found == {
        case: (2, True) if retried else (1, False) for case, retried in RETRIED.items()
    }


@pytest.mark.parametrize("version", ALL)
def test_a_lost_node_may_pass_for_a_success(version: str) -> None:
    """Argo before 4 takes a failed pod without exit codes for one that succeeded."""
    once = run(version, "train-job", "node lost", bad=1)
    old = version.rstrip("+") in OLD
    assert (once.attempts, once.phase) == (
        (1, "Succeeded") if old else (2, "Succeeded") if version == "2.17+" else (1, "Failed")
    )


@pytest.mark.parametrize("version", [*OLD, "2.14+", "2.15+", "2.16+", "2.17+"])
@pytest.mark.parametrize("step", ["train-job", "gate"])
def test_a_step_that_keeps_failing_is_run_as_often_as_it_says(version: str, step: str) -> None:
    assert run(version, step, "exit 1").attempts == 1 + retries(step)
    deleted = 1 + retries(step) if version.endswith("+") else 1
    assert run(version, step, "deleted").attempts == deleted


def test_with_2_17_alone_a_lost_step_restarts_the_pipeline_around_it() -> None:
    """Each of the seven DAGs around the step is run three times."""
    made = run("2.17", "train-job", "deleted")
    assert made.attempts == (1 + retries("train-job")) * 3**7
    assert run("2.17", "configs", "deleted").attempts == 3**5  # has no retries of its own


def test_the_setting_retries_no_pipeline() -> None:
    """Steps without retries fail at once, with exit codes and without."""
    for pod in ("exit 1", "deleted"):
        assert run("2.17+", "configs", pod).attempts == 1


@pytest.mark.parametrize("version", ["2.16", "2.17+"])
def test_a_step_that_failed_for_good_says_so_within_the_hour(version: str) -> None:
    """The waits between its attempts, which end at once."""
    for step in ("announce", "data", "weights", "train-job", "evaluate", "gate", "compare"):
        assert 0 < run(version, step, "exit 1").clock <= 3600, step


def test_the_backoff_of_argo() -> None:
    """Duration * factor^n; it gives up where the next wait would end after maxDuration."""

    def wait(factor: str, attempt: int, elapsed: float = 0.0, limit: str = "10") -> float | None:
        backoff = {"duration": "30", "factor": factor, "maxDuration": "3600"}
        return argo.Run.wait({"limit": limit, "backoff": backoff}, "Failed", attempt, elapsed)

    assert [wait("2", attempt) for attempt in range(1, 8)] == [30, 60, 120, 240, 480, 960, 1920]
    assert wait("2", 8) is None and wait("2", 7, 1700) is None
    assert {wait("1", attempt) for attempt in range(1, 11)} == {30}
    assert wait("1", 11) is None and wait("1", 11, limit="11") == 30


def test_a_compiled_pipeline_cannot_carry_the_policy() -> None:
    """Where a later kfp has a field for it, the pipeline should set it instead of the cluster."""
    fields = PipelineTaskSpec.RetryPolicy.DESCRIPTOR.fields_by_name
    backoff = {"backoff_duration", "backoff_factor", "backoff_max_duration"}
    assert set(fields) == {"max_retry_count", *backoff}
    assert not [
        name for name in KubernetesExecutorConfig.DESCRIPTOR.fields_by_name if "retr" in name
    ]
