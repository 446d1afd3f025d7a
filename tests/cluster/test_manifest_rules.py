"""Each rule of tests/helpers/manifests.py detects a violation, so none of the rules is vacuous."""

from __future__ import annotations

import pytest

from tests.cluster.test_job_schema import changed
from tests.cluster.test_manifests import installed, overlay, pools
from tests.helpers.manifests import insecure, needs_kubectl, pods, problems, refused

pytestmark = needs_kubectl
REPLICAS = ("spec", "pytorchReplicaSpecs")
POD = (*REPLICAS, "Master", "template", "spec")
NODE = ("spec", "template", "spec", "replicatedJobs", 0, "template")
CONTEXT, CONTAINER = ("spec", "securityContext"), ("spec", "containers", 0)
OWN = (*CONTAINER, "securityContext")
NO_TMP = [{"name": "vitdet-data", "mountPath": "/data"}]
LIMITS = {"cpu": "1", "memory": "1Gi"}

# (path in the job, value, expected text); KeyError removes the field
WEBHOOKS = {
    "PyTorchJob": [
        (("metadata", "name"), "1-job", "its name is no DNS-1035 label"),
        ((*REPLICAS, "Master", "replicas"), 2, "Master.replicas must be written as 1"),
        ((*REPLICAS, "Worker", "replicas"), 0, "Worker.replicas: at least 1"),
        (
            ("spec", "elasticPolicy"),
            {"maxReplicas": 2},
            "a Master beside elasticPolicy takes no part",
        ),
        (
            ("spec", "elasticPolicy"),
            {"nProcPerNode": 8},
            "elasticPolicy.nProcPerNode beside nprocPerNode",
        ),
        (
            ("spec",),
            {"elasticPolicy": {"maxReplicas": 2}, "pytorchReplicaSpecs": {}},
            "elasticPolicy needs Worker",
        ),
        (("spec", "nprocPerNode"), "0", "nprocPerNode 0"),
        ((*POD, "containers", 0, "name"), "torch", "Master has no container pytorch"),
        ((*POD, "restartPolicy"), "Never", "Master: a restart policy of the pod is overwritten"),
    ],
    "TrainingRuntime": [
        (("metadata", "name"), "1-job", "its name is no DNS-1035 label"),
        ((*NODE[:-1], "name"), "worker", "no replicated job `node`"),
        ((*NODE, "metadata"), {}, "its trainer step has no label"),
        ((*NODE, "spec", "template", *CONTAINER, "name"), "torch", "no container `node`"),
        (
            (*NODE, "spec", "template", *CONTAINER, "env"),
            [{"name": "PET_NNODES"}],
            "PET_NNODES is reserved",
        ),
    ],
}
# (path in a pod, value, expected text)
SECURITY = [
    ((*CONTEXT, "runAsNonRoot"), False, "may run as root"),
    ((*CONTEXT, "runAsUser"), 0, "may run as root"),
    ((*CONTEXT, "seccompProfile"), {"type": "Unconfined"}, "no seccomp profile"),
    *(
        (("spec", key), True, f"{key} is the host's")
        for key in ("hostNetwork", "hostPID", "hostIPC")
    ),
    (("spec", "volumes", 0), {"name": "x", "hostPath": {}}, "volume x is of a refused kind"),
    (("spec", "volumes", 0), {"name": "x", "emptyDir": {}}, "x has no limit"),
    (("spec", "automountServiceAccountToken"), KeyError, "has a token of the API server"),
    (("metadata", "annotations"), {}, "gets an Istio sidecar"),
    ((*OWN, "privileged"), True, "pytorch: privileged"),
    ((*OWN, "allowPrivilegeEscalation"), KeyError, "pytorch: may gain privileges"),
    ((*OWN, "readOnlyRootFilesystem"), KeyError, "pytorch: its root is writable"),
    ((*OWN, "capabilities"), {"drop": ["ALL"], "add": ["CHOWN"]}, "pytorch: keeps capabilities"),
    ((*CONTAINER, "resources"), {"limits": LIMITS}, "pytorch: no requests of cpu"),
    ((*CONTAINER, "resources"), {"requests": LIMITS}, "pytorch: no limits of memory"),
    ((*CONTAINER, "image"), "vitdet:latest", "pytorch: image vitdet:latest is not pinned"),
    ((*CONTAINER, "image"), "vitdet", "pytorch: image vitdet is not pinned"),
    ((*CONTAINER, "volumeMounts"), NO_TMP, "pytorch: nothing writable at /tmp"),
    (("spec", "volumes"), [], "pytorch: mounts tmp, which is no volume"),
]
# (kind, path, value, expected text) for one of the overlay's objects, checked with all objects
MLFLOW = ("spec", "template", "spec")
REFERENCES = [
    ("Deployment", (*MLFLOW, "serviceAccountName"), "nobody", "no ServiceAccount nobody in"),
    ("Deployment", (*MLFLOW, "priorityClassName"), "high", "no PriorityClass high in"),
    (
        "Deployment",
        (*MLFLOW, "volumes", 0),
        {"name": "x", "configMap": {"name": "lost"}},
        "no ConfigMap lost in",
    ),
    (
        "Deployment",
        (*MLFLOW, "volumes", 0),
        {"name": "x", "persistentVolumeClaim": {"claimName": "lost"}},
        "no PersistentVolumeClaim lost in",
    ),
    (
        "Deployment",
        (*MLFLOW, "containers", 0, "envFrom"),
        [{"secretRef": {"name": "lost"}}],
        "no Secret lost in",
    ),
    (
        "Deployment",
        ("spec", "selector", "matchLabels"),
        {"app.kubernetes.io/name": "lost"},
        "its own pods have no",
    ),
    (
        "Service",
        ("spec", "selector"),
        {"app.kubernetes.io/name": "lost"},
        "Service mlflow: no pod has",
    ),
    ("RoleBinding", ("roleRef", "name"), "lost", "no Role lost"),
]


def only(documents: list[dict], kind: str) -> dict:
    return next(document for document in documents if document["kind"] == kind)


@pytest.mark.parametrize(
    ("kind", "path", "value", "text"),
    [(kind, *case) for kind, cases in WEBHOOKS.items() for case in cases],
)
def test_a_webhook_violation_is_detected(kind: str, path: tuple, value: object, text: str) -> None:
    job = only([*overlay("eks"), *overlay("eks", "trainjob")], kind)
    assert refused(job) == []
    assert any(found.endswith(f": {text}") for found in refused(changed(job, path, value)))


@pytest.mark.parametrize(("path", "value", "text"), SECURITY)
def test_a_pod_security_violation_is_detected(path: tuple, value: object, text: str) -> None:
    _, pod = next(pods(overlay("eks")))
    assert insecure("pod", pod, set()) == []
    assert f"pod: {text}" in insecure("pod", changed(pod, path, value), set())


@pytest.mark.parametrize(("kind", "path", "value", "text"), REFERENCES)
def test_a_broken_reference_is_detected(kind: str, path: tuple, value: object, text: str) -> None:
    cluster = installed("eks")
    document = only(cluster, kind)
    others = [changed(document, path, value) if d is document else d for d in cluster]
    found = problems(others, overlay("eks"), pools("eks"))
    assert any(text in problem for problem in found), found


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("nodeSelector", {"vitdet/pool": "lost"}, "no pool has vitdet/pool=lost"),
        ("tolerations", [], "does not tolerate nvidia.com/gpu"),
        ("tolerations", [{"key": "lost"}], "tolerates lost, which no node is tainted with"),
    ],
)
def test_a_node_pool_mismatch_is_detected(key: str, value: object, text: str) -> None:
    job, *others = overlay("eks")
    found = problems(installed("eks"), [changed(job, (*POD, key), value), *others], pools("eks"))
    assert any(text in problem for problem in found), found
