"""The manifests on a real API server: validation, and the permissions of the service accounts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from components.launcher.templates import KINDS
from tests.cluster.test_manifests import JOBS, MANIFESTS, OVERLAYS, PARTS, build, overlay, parts
from tests.helpers.cluster import QUICK, kubectl, on_cluster
from tests.helpers.manifests import needs_kubectl

pytestmark = [*on_cluster, needs_kubectl]
# Kinds that only their own cloud or add-on defines; tests/cluster/test_manifests.py has their schemas.
UNKNOWN = set(
    "ComputeClass NodePool EC2NodeClass ClusterQueue LocalQueue ResourceFlavor "
    "WorkloadPriorityClass VirtualService".split()
)


def moved(documents: list[dict], namespace: str) -> list[dict]:
    """The same in another namespace; cluster-wide objects under another name."""
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
    said = kubectl(
        "apply --dry-run=server --validate=true --filename=-", given=yaml.safe_dump_all(documents)
    )
    assert said.count("created (server dry run)") == len(documents)


def test_a_server_accepts_the_options(namespace: str, copy: Path) -> None:
    jobs = ["one-zone", "no-priority-class", "rdma", "kueue", "volcano"]
    outside = ["mlflow-ingress", "mlflow-virtualservice"]
    documents = [
        *build(copy, "onprem", [*JOBS], [f"components/{one}" for one in (*jobs, "values")]),
        *build(copy, "onprem", ["mlflow"], [f"components/{one}" for one in (*outside, "values")]),
    ]
    given = yaml.safe_dump_all(moved(documents, namespace))
    assert "Ingress" in given and "podAffinity" in given
    said = kubectl("apply --dry-run=server --validate=true -f -", given=given)
    assert said.count("created (server dry run)") == len(moved(documents, namespace))


def test_a_server_refuses_a_typo(namespace: str) -> None:
    job = moved(overlay("kind"), namespace)[0]
    job["spec"]["runPolicy"]["backofLimit"] = 3
    assert "backofLimit" in kubectl(
        "apply --dry-run=server --filename=-", given=yaml.safe_dump(job), fails=True
    )


def may(account: str, namespace: str, verb: str, resource: str, name: str = "") -> bool:
    resource = f"{resource}/{name}" if name else resource
    who = f"system:serviceaccount:{namespace}:{account}"
    words = f"kubectl auth can-i {verb} {resource} --namespace {namespace} --as={who}"
    done = subprocess.run(words.split(), capture_output=True, text=True)
    assert done.stdout.strip() in ("yes", "no"), done.stderr
    return done.stdout.strip() == "yes"


def reviewed(account: str, namespace: str, verb: str, group: str, resource: str) -> bool:
    """As `may`, of a resource that the server does not serve: kubectl cannot split its name."""
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SubjectAccessReview",
        "spec": {
            "user": f"system:serviceaccount:{namespace}:{account}",
            "resourceAttributes": {
                "namespace": namespace,
                "verb": verb,
                "group": group,
                "resource": resource,
            },
        },
    }
    answer = kubectl("create -f - -o json", given=json.dumps(review))
    return json.loads(answer)["status"]["allowed"]


@pytest.fixture(scope="module")
def accounts(namespace: str) -> str:
    text = (MANIFESTS / "shared" / "accounts.yaml").read_text()
    kubectl(
        "apply --filename=-",
        given=yaml.safe_dump_all(moved(list(yaml.safe_load_all(text)), namespace)),
    )
    return namespace


def test_a_pipeline_s_account_may_what_it_must_and_no_more(accounts: str) -> None:
    def check(verb: str, resource: str, name: str = "") -> bool:
        return may("vitdet-pipeline", accounts, verb, resource, name)

    for verb in ("create", "get", "list", "patch", "delete"):
        assert check(verb, "pytorchjobs.kubeflow.org") and check(
            verb, "trainjobs.trainer.kubeflow.org"
        ), verb
    assert check("get", "pods") and check("list", "pods") and check("watch", "pods")
    assert check("get", "pods --subresource=log") and check("list", "events")
    assert not check("create", "events")
    assert check("get", "secrets", "mlpipeline-minio-artifact")
    assert check("get", "configmaps", "kfp-launcher")
    assert reviewed("vitdet-pipeline", accounts, "list", "kueue.x-k8s.io", "workloads")
    assert not reviewed("vitdet-pipeline", accounts, "patch", "kueue.x-k8s.io", "workloads")
    for verb, resource, name in [
        ("get", "secrets", ""),
        ("get", "secrets", "mlflow-server"),
        ("list", "secrets", ""),
        ("create", "pods", ""),
        ("delete", "pods", ""),
        ("create", "pods --subresource=exec", ""),
        ("create", "rolebindings.rbac.authorization.k8s.io", ""),
        ("update", "pytorchjobs.kubeflow.org", ""),
        ("deletecollection", "pytorchjobs.kubeflow.org", ""),
        ("create", "deployments.apps", ""),
        ("get", "nodes", ""),
        ("create", "serviceaccounts --subresource=token", ""),
    ]:
        assert not check(verb, resource, name), f"{verb} {resource} {name}"
    assert not may("vitdet-pipeline", accounts, "list", "pods --all-namespaces")
    denied = kubectl(
        f"get pods --namespace=default --as=system:serviceaccount:{accounts}:vitdet-pipeline",
        fails=True,
    )
    assert "forbidden" in denied


@pytest.mark.parametrize("kind", JOBS)
def test_the_launcher_s_requests_are_all_allowed(kind: str, accounts: str) -> None:
    exercise_launcher(kind, accounts, "vitdet-pipeline")


def exercise_launcher(kind: str, accounts: str, account: str) -> None:
    """All requests of the launcher in namespace `accounts`, as `account`."""
    from kubernetes import config

    from components.launcher.client import JobClient

    api = config.new_client_from_config()
    api.set_default_header("Impersonate-User", f"system:serviceaccount:{accounts}:{account}")
    said: list[str] = []
    cluster = JobClient(api, KINDS[kind], "vitdet-train", accounts, said.append, QUICK)
    *_, job = moved(overlay("kind", JOBS[kind]), accounts)
    # one that exists: else the garbage collector takes the job, sooner or later
    made = json.loads(kubectl(f"create configmap step-{kind} -n {accounts} -o json"))["metadata"]
    owner = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "name": made["name"],
        "uid": made["uid"],
        "blockOwnerDeletion": False,
    }
    assert cluster.create(job) and not cluster.create(job)
    cluster.adopt([owner])
    cluster.annotate({"vitdet/errors": "1"})
    assert cluster.get()["metadata"]["ownerReferences"][0]["name"] == f"step-{kind}"
    found, version = cluster.pods()
    assert found == [] and list(cluster.watch(version, 1)) == []
    assert cluster.log("vitdet-train-master-0") == []
    assert cluster.events("type=Warning") == []
    # Kueue is not installed, which is not the same as forbidden
    assert cluster.workloads(owner["uid"]) == []
    cluster.delete()
    assert cluster.get() is None and said == []
    with pytest.raises(RuntimeError, match=f"{account} has no Role for verb create"):
        JobClient(api, KINDS[kind], "vitdet-train", "default", said.append, QUICK).create(job)


def test_a_training_s_account_may_nothing(accounts: str) -> None:
    for verb, resource in [
        ("get", "pods"),
        ("list", "pods"),
        ("get", "secrets"),
        ("list", "events"),
        ("get", "configmaps"),
        ("create", "pytorchjobs.kubeflow.org"),
    ]:
        assert not may("vitdet-train", accounts, verb, resource), f"{verb} {resource}"
