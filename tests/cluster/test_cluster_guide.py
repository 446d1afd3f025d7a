"""What manifests/README.md says of `kubectl apply`, on a real API server: its commands, and what cannot be changed."""

from __future__ import annotations

import copy
import json
import shutil
import uuid
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.test_cluster_manifests import moved
from tests.cluster.test_manifests import MANIFESTS, overlay
from tests.helpers.cluster import kubectl, on_cluster

pytestmark = [*on_cluster, pytest.mark.skipif(not shutil.which("kubectl"), reason="needs kubectl")]


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"vitdet-guide-{uuid.uuid4().hex[:8]}"
    kubectl("create", "namespace", name)
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


@pytest.mark.parametrize("name", ["kind", "eks"])
def test_the_runtime_is_applied_alone_by_its_label(name: str) -> None:
    """Not the TrainJob beside it, which would start to train."""
    said = kubectl(
        "apply",
        "-k",
        str(MANIFESTS / "overlays" / name / "trainjob"),
        "--dry-run=client",
        "-l",
        "app.kubernetes.io/component=runtime",
        "-o",
        "name",
    )
    kind = "trainingruntime" if name == "kind" else "clustertrainingruntime"
    assert said.split() == [f"{kind}.trainer.kubeflow.org/vitdet-gpu-train"]


def test_the_administrator_s_part_is_applied_alone_by_its_label() -> None:
    said = kubectl(
        "apply",
        "-k",
        str(MANIFESTS / "overlays" / "onprem" / "cluster"),
        "--dry-run=client",
        "-l",
        "vitdet/scope=cluster",
        "-o",
        "name",
    )
    assert said.split() == ["priorityclass.scheduling.k8s.io/vitdet-train"]


def one(kind: str, namespace: str) -> dict:
    """The object of this kind that stays in a cluster, under names of this test."""
    (found,) = (
        document
        for document in moved(overlay("onprem", "cluster"), namespace)
        if document["kind"] == kind
    )
    return found


def test_what_cannot_change_is_refused(namespace: str) -> None:
    changes = {
        "PriorityClass": (
            lambda spec: spec.update(value=-2),
            "Forbidden: may not be changed in an update",
        ),
        "StatefulSet": (
            lambda spec: spec["spec"]["volumeClaimTemplates"][0]["spec"].update(
                storageClassName="other"
            ),
            "updates to statefulset spec for fields other than",
        ),
        "Job": (
            lambda spec: spec["spec"]["template"]["spec"]["containers"][0].update(
                image="other:1.0"
            ),
            "field is immutable",
        ),
        "PersistentVolumeClaim": (
            lambda spec: spec["spec"].update(storageClassName="other"),
            "is immutable after creation",
        ),
    }
    for kind, (change, said) in changes.items():
        before = one(kind, namespace)
        kubectl("apply", "-f", "-", given=before)
        try:
            after = copy.deepcopy(before)
            change(after)
            assert said in kubectl("apply", "-f", "-", given=after, fails=True), kind
        finally:
            kubectl("delete", "-f", "-", "--wait=false", given=before)


def test_a_profile_s_runtime_is_made_in_its_namespace(namespace: str) -> None:
    runtime, _ = moved(overlay("kind", "trainjob"), namespace)
    kubectl("apply", "-f", "-", given=runtime)
    found = json.loads(kubectl("get", "trainingruntimes", "-n", namespace, "-o", "json"))["items"]
    assert [one["metadata"]["name"] for one in found] == ["vitdet-gpu-train"]
    assert found[0]["spec"]["mlPolicy"]["numNodes"] == 2
    # training, and the demo's data
    assert yaml.safe_dump(found[0]["spec"]["template"]).count("vitdet:0.2.0") == 2


def test_the_patch_of_kubeflow_pipelines_keeps_the_rest_of_the_configmap(namespace: str) -> None:
    name = "workflow-controller-configmap"
    before = {"executor": "imagePullPolicy: IfNotPresent", "workflowDefaults": "spec: {}"}
    given = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": before}
    kubectl("apply", "-n", namespace, "-f", "-", given=given)
    file = MANIFESTS / "pipelines" / "workflow-defaults.yaml"
    kubectl("-n", namespace, "patch", "configmap", name, "--patch-file", str(file))
    data = json.loads(kubectl("get", "configmap", name, "-n", namespace, "-o", "json"))["data"]
    assert data["executor"] == before["executor"]
    spec = yaml.safe_load(data["workflowDefaults"])["spec"]
    ttl = spec["ttlStrategy"]
    job = yaml.safe_load((MANIFESTS / "pytorchjob" / "pytorchjob.yaml").read_text())
    kept = job["spec"]["runPolicy"]["ttlSecondsAfterFinished"]  # the Workflow owns the job
    assert ttl["secondsAfterFailure"] == ttl["secondsAfterCompletion"] == kept
    retry = {"limit": "0", "retryPolicy": "Always"}
    assert spec["templateDefaults"] == {"retryStrategy": retry}
