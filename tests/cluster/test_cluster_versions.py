"""Quotas and policies of a cluster, and other versions of its operator, on a real API server.

TrainJob of kubeflow/trainer 2.1.0 has podTemplateOverrides instead of runtimePatches, and no activeDeadlineSeconds;
2.0.1 has none of these fields. To imitate them, the tests install TrainJob definitions of their own API groups, since
other tests use the current one.
"""

from __future__ import annotations

import gzip
import http.server
import json
import ssl
import subprocess
import threading
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from kubernetes import client

from components.launcher.templates import KINDS, job_name
from tests.cluster.test_cluster_failures import NO_NODE, meanwhile, write_status
from tests.conftest import ROOT
from tests.helpers.cluster import (
    PIPELINE_RUN,
    QUICK,
    Scene,
    definition,
    kubectl,
    on_cluster,
    template,
    wait_until,
)

pytestmark = on_cluster
WAITING = replace(QUICK, schedule=60)


@pytest.fixture
def older_trainer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Make the launcher create TrainJobs of an older definition; return the template of a job."""
    group = f"trainer-{request.param.replace('.', '-')}.vitdet.test"
    old = replace(KINDS["trainjob"], group=group)
    text = gzip.decompress((ROOT / "tests/crds/crds.json.gz").read_bytes())
    # servers before 1.21 reject empty defaults of properties
    schemas = json.loads(
        text, object_hook=lambda node: {k: v for k, v in node.items() if (k, v) != ("default", "")}
    )
    schema = schemas["trainer.kubeflow.org/v1alpha1 TrainJob"]["schema"]
    spec = schema["properties"]["spec"]["properties"]
    del spec["activeDeadlineSeconds"]
    node = spec.pop("runtimePatches")["items"]["properties"]["trainingRuntimeSpec"]
    for key in ("template", "spec"):
        node = node["properties"][key]
    node = node["properties"]["replicatedJobs"]["items"]
    for key in ("template", "spec", "template"):
        node = node["properties"][key]
    del node["properties"]["spec"]["properties"]["imagePullSecrets"]  # its key has an empty default
    if request.param == "2.1":
        name = {"type": "object", "properties": {"name": {"type": "string"}}}
        targets = {"targetJobs": {"type": "array", "items": name}}
        override = {"type": "object", "properties": {**node["properties"], **targets}}
        spec["podTemplateOverrides"] = {"type": "array", "items": override}
    given = definition(old.group, old.version, old.plural, old.name, schema)
    # --validate=false: servers before 1.25 do not support CEL rules
    kubectl("create --validate=false -f -", given=given)
    kubectl(f"wait --for=condition=established crd/{old.plural}.{old.group}")
    monkeypatch.setitem(KINDS, "trainjob", old)
    job = yaml.safe_load(template("trainjob", script=True))
    yield yaml.safe_dump({**job, "apiVersion": f"{old.group}/{old.version}"})
    kubectl(f"delete crd {old.plural}.{old.group} --wait=false")


@pytest.mark.parametrize("older_trainer", ["2.1"], indirect=True)
def test_the_pod_settings_of_a_trainjob_reach_trainer_2_1(still: Scene, older_trainer: str) -> None:
    task = {
        "node_selector": {"disk": "fast"},
        "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "data"}}],
        "volume_mounts": [{"name": "data", "mountPath": "/data"}],
    }
    # no operator watches this API group, so the launcher gives up
    with pytest.raises(RuntimeError, match="has had no status"):
        timeouts = replace(QUICK, operator=3)
        arguments = {"kind": "trainjob", "task": task, "timeouts": timeouts}
        still.launch(older_trainer, ["true"], "older", **arguments)
    spec = still.job("older", "trainjob")["spec"]
    (override,) = spec["podTemplateOverrides"]
    assert override["spec"]["nodeSelector"] == {"disk": "fast"} and "runtimePatches" not in spec
    assert override["spec"]["volumes"] == task["volumes"]
    assert override["spec"]["containers"] == [
        {"name": "node", "volumeMounts": task["volume_mounts"]}
    ]
    (line,) = [line for line in still.lines if "the cluster's TrainJob has no" in line]
    assert "no spec.activeDeadlineSeconds" in line


@pytest.mark.parametrize("older_trainer", ["2.0"], indirect=True)
def test_lost_pod_settings_are_an_error_and_a_lost_deadline_is_a_warning(
    still: Scene, older_trainer: str
) -> None:
    task = {"node_selector": {"disk": "fast"}}
    with pytest.raises(RuntimeError) as raised:
        still.launch(older_trainer, ["true"], "lost", kind="trainjob", task=task)
    text = str(raised.value)
    assert text.startswith(f"TrainJob {job_name(PIPELINE_RUN, 'lost')} was deleted: ")
    assert "spec.runtimePatches, which set nodeSelector of the pods (upgrade Kubeflow" in text
    assert "\n" not in text and any("no spec.activeDeadlineSeconds" in line for line in still.lines)
    wait_until(lambda: still.job("lost", "trainjob") is None)
    # without pod settings only the deadline and labels are lost; no operator watches this API group, so the launcher gives up
    with pytest.raises(RuntimeError, match="has had no status"):
        timeouts = replace(QUICK, operator=3)
        still.launch(older_trainer, ["true"], "warned", kind="trainjob", timeouts=timeouts)
    assert any("the pods lack the run's labels" in line for line in still.lines)
    assert still.job("warned", "trainjob") is not None


def test_a_rejection_by_a_quota_is_retried_and_then_reported(still: Scene) -> None:
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "trainings"},
        "spec": {"hard": {"count/pytorchjobs.kubeflow.org": "0"}},
    }
    kubectl(f"apply -n {still.namespace} -f -", given=quota)
    # as the quota controller would compute it
    count = {"count/pytorchjobs.kubeflow.org": "0"}
    client.CoreV1Api().patch_namespaced_resource_quota_status(
        "trainings", still.namespace, {"status": {"hard": count, "used": count}}
    )

    def free() -> None:
        wait_until(lambda: any("retrying for up to 30 s" in line for line in still.lines))
        kubectl(f"delete resourcequota trainings -n {still.namespace}")

    with pytest.raises(RuntimeError, match="exceeded quota: trainings.*HTTP 403.*for 3 s$"):
        still.launch(template(script=True), ["true"], "refused")
    limits = replace(QUICK, schedule=1)  # the job file's timeout applies
    with meanwhile(free), meanwhile(lambda: unschedulable(still, "quota")):
        with pytest.raises(
            RuntimeError, match="has not been able to start"
        ):  # the job was created, but has no node
            still.launch(slow_node_job(), ["true"], "quota", timeouts=limits)
    assert still.job("quota") is not None


def unschedulable(made: Scene, recipe: str) -> None:
    pods = wait_until(lambda: made.pods(recipe))
    write_status(made, pods[0]["metadata"]["name"], NO_NODE)


def slow_node_job() -> str:
    """Return a job file with a timeout of 30 s for nodes."""
    job = yaml.safe_load(template(script=True))
    job["metadata"]["annotations"] = {"vitdet/schedule-seconds": "30"}
    return yaml.safe_dump(job)


class Policy:
    """An admission webhook that rejects one namespace's PyTorchJobs with this message while `refuses` is set."""

    def __init__(self, folder: Path, namespace: str, message: str) -> None:
        self.folder, self.namespace, self.message, self.refuses = folder, namespace, message, True
        self.name = f"policy.{namespace}.test"

    def __enter__(self) -> Policy:
        policy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                answer: dict = {"uid": review["request"]["uid"], "allowed": not policy.refuses}
                if policy.refuses:
                    answer["status"] = {"code": 403, "message": policy.message}
                body = json.dumps({**review, "response": answer}).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *words: object) -> None:
                pass

        cert, key = self.folder / "cert.pem", self.folder / "key.pem"
        words = "openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=policy -addext subjectAltName=IP:127.0.0.1"
        subprocess.run(
            [*words.split(), "-keyout", key, "-out", cert], check=True, capture_output=True
        )
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        kubectl(f"label namespace {self.namespace} vitdet-test={self.namespace}")
        rule = {"apiGroups": ["kubeflow.org"], "apiVersions": ["v1"], "operations": ["CREATE"]}
        rule |= {"resources": ["pytorchjobs"]}
        configuration = {
            "apiVersion": "admissionregistration.k8s.io/v1",
            "kind": "ValidatingWebhookConfiguration",
            "metadata": {"name": self.name},
            "webhooks": [
                {
                    "name": self.name,
                    "admissionReviewVersions": ["v1"],
                    "sideEffects": "None",
                    "failurePolicy": "Ignore",
                    "namespaceSelector": {"matchLabels": {"vitdet-test": self.namespace}},
                    "clientConfig": {
                        "url": f"https://127.0.0.1:{self.server.server_port}/",
                        "caBundle": b64encode(cert.read_bytes()).decode(),
                    },
                    "rules": [rule],
                }
            ],
        }
        kubectl("apply -f -", given=configuration)
        job = yaml.safe_load(template(script=True))
        job["metadata"].update(name="probe", namespace=self.namespace)
        wait_until(lambda: self.refuses_now(job))
        return self

    def refuses_now(self, job: dict) -> bool:
        """Return whether the API server already calls the webhook."""
        done = subprocess.run(
            ["kubectl", "create", "--dry-run=server", "-f", "-"],
            input=json.dumps(job),
            capture_output=True,
            text=True,
        )
        return "denied the request" in done.stderr

    def __exit__(self, *error: object) -> None:
        kubectl(f"delete validatingwebhookconfiguration {self.name}")
        self.server.shutdown()
        self.server.server_close()


def test_a_rejection_by_policy_is_retried_and_an_invalid_field_is_not(
    still: Scene, tmp_path: Path
) -> None:
    with Policy(tmp_path, still.namespace, "no trainings\nat night") as policy:

        def allow() -> None:
            wait_until(lambda: any("no trainings at night" in line for line in still.lines))
            policy.refuses = False

        with meanwhile(allow), meanwhile(lambda: unschedulable(still, "night")):
            with pytest.raises(RuntimeError, match="has not been able to start"):
                still.launch(slow_node_job(), ["true"], "night")
        assert still.job("night") is not None
        policy.refuses, policy.message = True, "spec.nprocPerNode: Invalid value: x: must be y"
        with pytest.raises(RuntimeError) as raised:
            still.launch(template(script=True), ["true"], "invalid", timeouts=WAITING)
    assert str(raised.value).endswith("must be y (HTTP 403)")
