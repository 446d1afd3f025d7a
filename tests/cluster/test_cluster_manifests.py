"""The manifests on a real API server: validation, and the permissions of the service accounts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from components.launcher.templates import KINDS
from tests.cluster.test_manifests import JOBS, MANIFESTS, OVERLAYS, PARTS, build, overlay, parts
from tests.helpers.cluster import QUICK, kubectl, on_cluster
from tests.helpers.manifests import needs_kubectl

pytestmark = [*on_cluster, needs_kubectl]
# Kinds that only a cloud or an add-on defines; test_manifests.py checks them by their schemas.
UNKNOWN = set(
    "ComputeClass NodePool EC2NodeClass ClusterQueue LocalQueue ResourceFlavor "
    "WorkloadPriorityClass VirtualService".split()
)


def moved(documents: list[dict], namespace: str) -> list[dict]:
    """Move objects to a namespace (rename cluster-scoped ones); drop Namespaces and UNKNOWN."""
    text = yaml.safe_dump_all(document for document in documents if document["kind"] not in UNKNOWN)
    found = list(yaml.safe_load_all(text))
    for document in found:
        if "namespace" in document["metadata"]:
            document["metadata"]["namespace"] = namespace
        elif document["kind"] != "Namespace":
            document["metadata"]["name"] += f"-{namespace[-8:]}"
        for subject in document.get("subjects", []):
            subject["namespace"] = namespace
    return [document for document in found if document["kind"] != "Namespace"]


@pytest.mark.parametrize("part", [*PARTS, *JOBS])
@pytest.mark.parametrize("name", OVERLAYS)
def test_a_server_accepts_an_overlay(name: str, part: str, namespace: str) -> None:
    if part in PARTS and part not in parts(name):
        pytest.skip("kind has none")
    documents = moved(overlay(name, JOBS.get(part, part)), namespace)
    check_accepted(documents)


def check_accepted(documents: list[dict]) -> None:
    given = yaml.safe_dump_all(documents)
    said = kubectl("apply --dry-run=server --validate=true --filename=-", given=given)
    assert said.count("created (server dry run)") == len(documents)


def test_a_server_accepts_the_options(namespace: str, copy: Path) -> None:
    jobs = ["one-zone", "no-priority-class", "rdma", "kueue", "volcano"]
    outside = ["mlflow-ingress", "mlflow-virtualservice"]
    documents = [
        *build(copy, "onprem", [*JOBS], [f"components/{name}" for name in (*jobs, "values")]),
        *build(copy, "onprem", ["mlflow"], [f"components/{name}" for name in (*outside, "values")]),
    ]
    assert "Ingress" in str(documents) and "podAffinity" in str(documents)
    check_accepted(moved(documents, namespace))


def test_a_server_rejects_a_typo(namespace: str) -> None:
    job = moved(overlay("kind"), namespace)[0]
    job["spec"]["runPolicy"]["backofLimit"] = 3
    assert "backofLimit" in kubectl("apply --dry-run=server -f -", given=job, fails=True)


def may(user: str, namespace: str, verb: str, resource: str, name: str = "") -> bool:
    """Return whether RBAC allows a request; resource: PLURAL.GROUP or PLURAL/SUBRESOURCE."""
    plural, _, group = resource.partition(".")
    plural, _, part = plural.partition("/")
    attributes = {"namespace": namespace, "verb": verb, "group": group, "resource": plural}
    attributes |= {"subresource": part, "name": name}
    about = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview"}
    review = {**about, "spec": {"user": user, "resourceAttributes": attributes}}
    return json.loads(kubectl("create -f - -o json", given=review))["status"]["allowed"]


@pytest.fixture(scope="module")
def accounts(namespace: str) -> str:
    documents = list(yaml.safe_load_all((MANIFESTS / "shared" / "accounts.yaml").read_text()))
    kubectl("apply --filename=-", given=yaml.safe_dump_all(moved(documents, namespace)))
    return namespace


def test_the_pipelines_account_has_exactly_the_permissions_it_needs(accounts: str) -> None:
    user = f"system:serviceaccount:{accounts}:vitdet-pipeline"
    allowed = """
        create,get,list,patch,delete pytorchjobs.kubeflow.org
        create,get,list,patch,delete trainjobs.trainer.kubeflow.org
        get,list,watch pods
        get pods/log
        list events
        get secrets mlpipeline-minio-artifact
        get configmaps kfp-launcher
        list workloads.kueue.x-k8s.io"""
    refused = """
        create events
        patch workloads.kueue.x-k8s.io
        get,list secrets
        get secrets mlflow-server
        create,delete pods
        create pods/exec
        create rolebindings.rbac.authorization.k8s.io
        update,deletecollection pytorchjobs.kubeflow.org
        create deployments.apps
        get nodes
        create serviceaccounts/token"""
    for text, expected in ((allowed, True), (refused, False)):
        for verbs, *what in map(str.split, text.strip().splitlines()):
            for verb in verbs.split(","):
                assert may(user, accounts, verb, *what) == expected, (verb, what)
    assert not may(user, "", "list", "pods")  # in all namespaces
    denied = kubectl(f"get pods --namespace=default --as={user}", fails=True)
    assert "forbidden" in denied


@pytest.mark.parametrize("kind", JOBS)
def test_all_requests_of_the_launcher_are_allowed(kind: str, accounts: str) -> None:
    exercise_launcher(kind, accounts, "vitdet-pipeline")


def exercise_launcher(kind: str, accounts: str, account: str) -> None:
    """Send every kind of request of the launcher to namespace `accounts`, as `account`."""
    from kubernetes import config

    from components.launcher.client import JobClient

    api = config.new_client_from_config()
    api.set_default_header("Impersonate-User", f"system:serviceaccount:{accounts}:{account}")
    said: list[str] = []
    cluster = JobClient(api, KINDS[kind], "vitdet-train", accounts, said.append, QUICK)
    *_, job = moved(overlay("kind", JOBS[kind]), accounts)
    # an existing owner: otherwise the garbage collector deletes the job
    made = json.loads(kubectl(f"create configmap step-{kind} -n {accounts} -o json"))["metadata"]
    owner = {"apiVersion": "v1", "kind": "ConfigMap", "name": made["name"], "uid": made["uid"]}
    owner |= {"blockOwnerDeletion": False}
    assert cluster.create(job) and not cluster.create(job)
    cluster.adopt([owner])
    cluster.annotate({"vitdet/errors": "1"})
    assert cluster.get()["metadata"]["ownerReferences"][0]["name"] == f"step-{kind}"
    found, version = cluster.pods()
    assert found == [] and list(cluster.watch(version, 1)) == []
    assert cluster.log("vitdet-train-master-0") == []
    assert cluster.events("type=Warning") == []
    # Kueue is not installed: 404, not 403
    assert cluster.workloads(owner["uid"]) == []
    cluster.delete()
    assert cluster.get() is None and said == []
    with pytest.raises(RuntimeError, match=f"{account} has no Role that allows create"):
        JobClient(api, KINDS[kind], "vitdet-train", "default", said.append, QUICK).create(job)


def test_the_account_of_training_pods_has_no_permissions(accounts: str) -> None:
    user = f"system:serviceaccount:{accounts}:vitdet-train"
    for resource in ("pods", "secrets", "events", "configmaps", "pytorchjobs.kubeflow.org"):
        for verb in ("get", "list", "create"):
            assert not may(user, accounts, verb, resource), f"{verb} {resource}"
