"""Commands of docs/kubeflow.md on a real API server, and changes that the guide says are rejected."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import uuid
from collections.abc import Iterator

import pytest
import yaml

from tests.cluster.test_cluster_manifests import moved
from tests.cluster.test_job_schema import changed
from tests.cluster.test_manifests import MANIFESTS, installed, overlay
from tests.helpers.cluster import kubectl, on_cluster
from tests.helpers.guide import BLOCKS, lines
from tests.helpers.manifests import needs_kubectl

pytestmark = [*on_cluster, needs_kubectl]


def applied(name: str, line: str) -> list[str]:
    """Return the names of the objects that a command of the guide applies from an overlay."""
    command = line.replace("$O", str(MANIFESTS / "overlays" / name)) + " --dry-run=client -o name"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize("name", ["kind", "eks"])
def test_a_label_selects_the_runtime_alone(name: str) -> None:
    """Applying the TrainJob in the same folder would start training."""
    (line,) = lines("kubectl apply -k $O/trainjob -l")
    assert applied(name, line) == ["trainingruntime.trainer.kubeflow.org/vitdet-gpu-train"]


# Skip commands that need a running pod or an installed service, or prepare a namespace.
SKIP = """kubectl() { case "$*" in *" exec "*|*" rollout "*|*"apply -k"*|*" wait "*|"create namespace"*|"label namespace"*) cat > /dev/null ;;
  *) command kubectl "$@" ;; esac; }
"""


@pytest.fixture
def spaces() -> Iterator[dict[str, str]]:
    suffix = uuid.uuid4().hex[:8]
    found = {"NS": f"vitdet-guide-{suffix}", "M": f"vitdet-guide-{suffix}-mlflow"}
    for name in found.values():
        kubectl(f"create namespace {name}")
    yield found
    for name in found.values():
        kubectl(f"delete namespace {name} --wait=false")


def run_blocks(word: str, spaces: dict[str, str]) -> None:
    blocks = [block for block in BLOCKS if word in block]
    assert blocks
    for block in blocks:
        environment = {**os.environ, **spaces, "O": "overlay"}
        done = subprocess.run(
            ["bash", "-eu", "-c", SKIP + block],
            capture_output=True,
            text=True,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
        assert done.returncode == 0, block + done.stderr


def secret(namespace: str, name: str) -> dict:
    return json.loads(kubectl(f"get secret {name} -n {namespace} -o json"))


def test_the_secrets_have_the_keys_that_the_pods_read(spaces: dict[str, str]) -> None:
    run_blocks("kubectl -n $M create secret generic mlflow-server", spaces)
    run_blocks("kubectl -n $NS create secret generic vitdet-mlflow", spaces)
    run_blocks("create secret docker-registry", spaces)
    names = {"MLFLOW_AUTH_ADMIN_PASSWORD", "PGPASSWORD", "MLFLOW_FLASK_SERVER_SECRET_KEY"}
    assert secret(spaces["M"], "mlflow-server")["data"].keys() == names
    ours = {
        key: base64.b64decode(value).decode()
        for key, value in secret(spaces["NS"], "vitdet-mlflow")["data"].items()
    }
    assert ours["MLFLOW_TRACKING_URI"] == f"http://mlflow.{spaces['M']}.svc:5000"
    assert ours["MLFLOW_TRACKING_USERNAME"] == "vitdet"
    assert len(ours["MLFLOW_TRACKING_PASSWORD"]) == 32
    for namespace in spaces.values():
        assert secret(namespace, "vitdet-registry")["type"] == "kubernetes.io/dockerconfigjson"


def test_the_migration_copies_the_secret_of_the_mlflow_server(spaces: dict[str, str]) -> None:
    words = ("create", "secret", "generic", "mlflow-server", "-n", spaces["NS"])
    kubectl(*words, "--from-literal=PGPASSWORD=old", "--from-literal=MLFLOW_AUTH_ADMIN_PASSWORD=x")
    run_blocks("get secret mlflow-server -o json", spaces)
    data = secret(spaces["NS"], "mlflow-server")["data"]
    assert len(data) == 2 and secret(spaces["M"], "mlflow-server")["data"] == data


def constant_object(kind: str, namespace: str) -> dict:
    """Return an object of this kind from overlays/onprem, moved to this namespace."""
    (found,) = (
        document
        for document in moved(installed("onprem"), namespace)
        if document["kind"] == kind
        and (kind, document["metadata"]["name"]) != ("Job", "vitdet-data")  # one Job is enough
    )
    return found


def test_changes_to_immutable_fields_are_rejected(namespace: str) -> None:
    claim = ("spec", "volumeClaimTemplates", 0, "spec", "storageClassName")
    image = ("spec", "template", "spec", "containers", 0, "image")
    changes = {
        "PriorityClass": (("value",), -2, "Forbidden: may not be changed in an update"),
        "StatefulSet": (claim, "other", "updates to statefulset spec for fields other than"),
        "Job": (image, "other:1.0", "field is immutable"),
        "PersistentVolumeClaim": (claim[-2:], "other", "is immutable after creation"),
    }
    for kind, (path, value, said) in changes.items():
        before = constant_object(kind, namespace)
        kubectl("apply -f -", given=before)
        try:
            after = changed(before, path, value)
            assert said in kubectl("apply -f -", given=after, fails=True), kind
        finally:
            kubectl("delete -f - --wait=false", given=before)


def test_a_profiles_runtime_is_created_in_its_namespace(namespace: str) -> None:
    runtime, _ = moved(overlay("kind", "trainjob"), namespace)
    kubectl("apply -f -", given=runtime)
    found = json.loads(kubectl(f"get trainingruntimes -n {namespace} -o json"))["items"]
    assert [document["metadata"]["name"] for document in found] == ["vitdet-gpu-train"]
    assert found[0]["spec"]["mlPolicy"]["numNodes"] == 2
    # the training image, its variable VITDET_IMAGE, and the demo's data job
    assert yaml.safe_dump(found[0]["spec"]["template"]).count("vitdet:0.2.0") == 3


def test_the_kubeflow_pipelines_patch_keeps_the_rest_of_the_configmap(namespace: str) -> None:
    name = "workflow-controller-configmap"
    before = {"executor": "imagePullPolicy: IfNotPresent", "workflowDefaults": "spec: {}"}
    given = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": before}
    kubectl(f"apply -n {namespace} -f -", given=given)
    file = MANIFESTS / "pipelines" / "workflow-defaults.yaml"
    kubectl(f"-n {namespace} patch configmap {name} --patch-file", str(file))
    data = json.loads(kubectl(f"get configmap {name} -n {namespace} -o json"))["data"]
    assert data["executor"] == before["executor"]
    spec = yaml.safe_load(data["workflowDefaults"])["spec"]
    ttl = spec["ttlStrategy"]
    job = yaml.safe_load((MANIFESTS / "pytorchjob" / "pytorchjob.yaml").read_text())
    kept = job["spec"]["runPolicy"]["ttlSecondsAfterFinished"]  # the Workflow owns the job
    assert ttl["secondsAfterFailure"] == ttl["secondsAfterCompletion"] == kept
    retry = {"limit": "0", "retryPolicy": "Always"}
    assert spec["templateDefaults"] == {"retryStrategy": retry}
