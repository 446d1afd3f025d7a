"""A TrainJob whose pods are evicted, fail or run out of memory, under the failure policy of manifests/trainjob.

The tests write the pods' statuses, as the kubelet would. Their API server has no condition for evicted pods:
Kubernetes 1.26 and later set DisruptionTarget in pkg/kubelet/eviction/eviction_manager.go and
pkg/kubelet/nodeshutdown (TerminationByKubelet), pkg/registry/core/pod/rest/eviction.go (EvictionByEvictionAPI),
pkg/controller/tainteviction (DeletionByTaintManager), pkg/controller/podgc (DeletionByPodGC) and in the scheduler
(PreemptionByScheduler). tests/helpers/fake_jobset.py imitates JobSet and the Job controller.
"""

from __future__ import annotations

import re

import pytest
import yaml
from kubernetes import client

from tests.conftest import ROOT
from tests.helpers.cluster import Scene, kubectl, on_cluster, template, wait_until
from tests.helpers.fake_jobset import job_failure, jobset_failure
from tests.helpers.manifests import kustomize

RESTARTS = 2
REASONS = (
    "EvictionByEvictionAPI",
    "PreemptionByScheduler",
    "DeletionByTaintManager",
    "DeletionByPodGC",
    "TerminationByKubelet",
)


def ended(code: int, reason: str = "Error", container: str = "node") -> dict:
    """Return the status of a pod whose container ended with this exit code and reason."""
    state = {"terminated": {"exitCode": code, "reason": reason}}
    status = {"name": container, "image": "", "imageID": "", "ready": False, "restartCount": 0}
    return {"phase": "Failed", "containerStatuses": [{**status, "state": state}]}


def disrupted(reason: str, status: dict) -> dict:
    """Return this status with the condition of a pod that was evicted or lost its node."""
    condition = {"type": "DisruptionTarget", "status": "True", "reason": reason}
    return {**status, "conditions": [condition]}


@pytest.fixture(scope="module")
def runtime() -> dict:
    """Return the runtime of the manifests, which allows two restarts after errors."""
    (found,) = (
        document
        for document in kustomize(ROOT / "manifests/overlays/kind/trainjob")
        if document["kind"] == "TrainingRuntime"
    )
    found["spec"]["template"]["spec"]["failurePolicy"]["maxRestarts"] = RESTARTS
    return found


def outcome(runtime: dict, *statuses: dict, counted: int = 0) -> tuple[str, str] | None:
    """Return reason and message of a TrainJob that fails with these pods, None if it restarts."""
    spec = runtime["spec"]["template"]["spec"]
    pods = [
        {"metadata": {"namespace": "ns", "name": f"train-node-0-{index}"}, "status": status}
        for index, status in enumerate(statuses)
    ]
    failure = job_failure(spec["replicatedJobs"][0]["template"]["spec"], pods)
    assert failure is not None
    return jobset_failure(spec["failurePolicy"], *failure, counted, "train-node-0")


@pytest.mark.parametrize("reason", REASONS)
@pytest.mark.parametrize("code", [0, 1, 137, 143])
def test_a_disruption_does_not_count_as_an_error(runtime: dict, reason: str, code: int) -> None:
    """This holds for any exit code of its containers, and if another pod has failed."""
    evicted = disrupted(reason, ended(code) if code else {"phase": "Failed"})
    for pods in ([evicted], [ended(1), evicted], [evicted, ended(1)]):
        assert outcome(runtime, *pods, counted=RESTARTS) is None


def test_running_out_of_memory_fails_the_job_without_a_restart(runtime: dict) -> None:
    for pods in ([ended(137, "OOMKilled")], [ended(1), ended(137, "OOMKilled")]):
        reason, _ = outcome(runtime, *pods)
        assert reason == "FailJobSetFailurePolicyAction"


def test_other_errors_count_towards_the_restarts(runtime: dict) -> None:
    """They include errors of a sidecar and of a pod whose DisruptionTarget is not true."""
    not_true = {**ended(1), "conditions": [{"type": "DisruptionTarget", "status": "False"}]}
    for pod in (ended(1), ended(143), ended(137, container="istio-proxy"), not_true):
        assert outcome(runtime, pod, counted=RESTARTS - 1) is None
        reason, _ = outcome(runtime, pod, counted=RESTARTS)
        assert reason == "ReachedMaxRestarts"


def test_the_failure_rules_meet_the_webhooks_requirements(runtime: dict) -> None:
    """JobSet 0.12: pkg/webhooks/jobset_webhook.go; Kubernetes: pkg/apis/batch/validation/validation.go."""
    spec = runtime["spec"]["template"]["spec"]
    names = [rule["name"] for rule in spec["failurePolicy"]["rules"]]
    assert len(set(names)) == len(names)
    for rule in spec["failurePolicy"]["rules"]:
        assert re.fullmatch(r"[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?", rule["name"])
        assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    assert job["template"]["spec"]["restartPolicy"] == "Never"
    for rule in job["podFailurePolicy"]["rules"]:
        assert len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1
        if codes := rule.get("onExitCodes"):
            containers = job["template"]["spec"]["containers"]
            assert codes["containerName"] in {container["name"] for container in containers}
            assert codes["values"] == sorted({*codes["values"]}) and 0 not in codes["values"]


@pytest.fixture(scope="module")
def still(still: Scene, runtime: dict) -> Scene:
    own = {**runtime, "metadata": {**runtime["metadata"], "namespace": still.namespace}}
    kubectl("apply -f -", given=own)
    return still


class Job:
    """A TrainJob whose pods are ended by the test."""

    def __init__(self, made: Scene, name: str) -> None:
        self.namespace, self.name, self.seen = made.namespace, name, set()
        job = yaml.safe_load(template("trainjob"))
        job["metadata"] |= {"name": name, "namespace": made.namespace}
        kubectl("apply -f -", given=job)

    def pods(self) -> list[client.V1Pod]:
        """Return the two pods created since the last restart, or [] until both exist."""
        label = f"jobset.sigs.k8s.io/jobset-name={self.name}"
        pods = client.CoreV1Api().list_namespaced_pod(self.namespace, label_selector=label).items
        fresh = [pod for pod in pods if pod.metadata.uid not in self.seen]
        return fresh if len(fresh) == 2 else []

    def end(self, *statuses: dict) -> None:
        """Wait for the pods created since the last restart and write these statuses."""
        pods = wait_until(self.pods, 60)
        self.seen |= {pod.metadata.uid for pod in pods}
        for pod, status in zip(pods, statuses, strict=False):
            client.CoreV1Api().patch_namespaced_pod_status(
                pod.metadata.name, self.namespace, {"status": status}
            )

    def failure(self) -> dict | None:
        """Return the job's condition Failed, if any."""
        job = client.CustomObjectsApi().get_namespaced_custom_object(
            "trainer.kubeflow.org", "v1alpha1", self.namespace, "trainjobs", self.name
        )
        conditions = job.get("status", {}).get("conditions", [])
        return next((condition for condition in conditions if condition["type"] == "Failed"), None)


def cluster(test: object) -> object:
    """Apply the marks of tests that need an API server."""
    for mark in on_cluster:
        test = mark(test)
    return test


@cluster
def test_ten_evictions_do_not_exhaust_the_restarts(still: Scene) -> None:
    job = Job(still, "evicted")
    for index in range(10):
        job.end(disrupted(REASONS[index % len(REASONS)], ended(143)))
    for _ in range(RESTARTS):
        job.end(ended(1))
    wait_until(job.pods, 60)
    assert job.failure() is None
    job.end(ended(1))
    failure = wait_until(job.failure, 60)
    text = "jobset failed due to reaching max number of restarts (first failed job: evicted-node-0)"
    assert (failure["reason"], failure["message"]) == ("ReachedMaxRestarts", text)


@cluster
def test_running_out_of_memory_ends_the_job_at_once(still: Scene) -> None:
    job = Job(still, "oom")
    job.end(ended(137, "OOMKilled"))
    failure = wait_until(job.failure, 60)
    assert failure["reason"] == "FailJobSetFailurePolicyAction"
    assert "first failed job: oom-node-0" in failure["message"]
    assert not job.pods()
