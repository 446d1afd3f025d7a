"""Variables that Kubeflow Pipelines' MLflow plugin adds to a step's pod and to its training job."""

from __future__ import annotations

import json

import pytest
import yaml

from components.launcher.templates import KINDS, JobRequest, fill_template
from tests.conftest import ROOT
from tests.helpers.cluster import job_containers, kubectl, on_cluster, template

pytestmark = on_cluster

# kubeflow/pipelines 2.17.0 sets EVERYWHERE in all containers (backend/src/apiserver/plugins/mlflow/handler.go) and,
# with injectUserEnvVars, INJECTED in the patch of a step's pod (backend/src/v2/common/plugins/mlflow/handler.go).
EVERYWHERE = [{"name": "KFP_MLFLOW_CONFIG", "value": "{}"}] + [
    {
        "name": f"MLFLOW_TRACKING_{key.upper()}",
        "valueFrom": {"secretKeyRef": {"name": "kfp-mlflow-credentials", "key": key}},
    }
    for key in ("username", "password")
]
INJECTED = [
    {"name": "MLFLOW_RUN_ID", "value": "1" * 32},
    {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow.plugin"},
    {"name": "MLFLOW_EXPERIMENT_ID", "value": "7"},
    *EVERYWHERE[1:],
]


def secret_env(step: str) -> list[dict]:
    """Return the variables that the driver creates from secretAsEnv (backend/src/v2/driver/k8s.go)."""
    text = (ROOT / "tests" / "golden_pipeline" / "pipeline.yaml").read_text()
    _, platform = yaml.safe_load_all(text)
    executor = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][step]
    found = []
    for secret in executor["secretAsEnv"]:
        reference = {"name": secret["secretName"], "optional": secret["optional"]}
        for key in secret["keyToEnv"]:
            source = {"secretKeyRef": {**reference, "key": key["secretKey"]}}
            found.append({"name": key["envVar"], "valueFrom": source})
    return found


def patched_env(namespace: str, name: str, env: list[dict], fails: bool = False) -> object:
    """Return a pod's variables after a strategic merge patch as Argo sends it, or the error."""
    container = {"name": "main", "image": "vitdet"}
    template = {"spec": {"containers": [{**container, "env": EVERYWHERE}]}}
    metadata = {"name": name, "namespace": namespace}
    made = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": metadata, "template": template}
    kubectl("create -f -", given=made)
    patch = json.dumps({"template": {"spec": {"containers": [{**container, "env": env}]}}})
    words = ["patch", "podtemplate", name, "-n", namespace, "--type", "strategic", "-p", patch]
    out = kubectl(*words, "-o", "json", fails=fails)
    return out if fails else json.loads(out)["template"]["spec"]["containers"][0]["env"]


def test_each_variable_occurs_once_in_the_pod_of_a_step(namespace: str) -> None:
    env = secret_env("exec-evaluate")
    found = patched_env(namespace, "step", [*INJECTED, *env])
    names = [variable["name"] for variable in found]
    assert len(names) == len(set(names)) and {variable["name"] for variable in env} < set(names)
    assert {"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow.plugin"} in found
    # this is why the variables from the step's Secret have the prefix VITDET_
    same = [{**variable, "name": variable["name"].removeprefix("VITDET_")} for variable in env]
    refused = patched_env(namespace, "refused", [*INJECTED, *same], fails=True)
    assert "may not be specified when `value` is not empty" in refused


@pytest.mark.parametrize("kind", ["pytorchjob", "trainjob"])
def test_each_variable_occurs_once_in_a_training_job(namespace: str, kind: str) -> None:
    task = {"env": [*INJECTED, *secret_env("exec-train-job")]}
    request = JobRequest("vitdet-tiny", namespace, {}, "", ["train", "tiny"], 2, "", task=task)
    job = fill_template(template(kind), KINDS[kind], request)
    # like the launcher, kubectl does not validate: each version of Trainer lacks one of the fields
    words = "create --validate=false --dry-run=server -o json -f -"
    made = json.loads(kubectl(words, given=job))
    for container in job_containers(made):
        names = [variable["name"] for variable in container["env"]]
        assert names.count("MLFLOW_TRACKING_URI") == 1 and len(names) == len(set(names))
        assert {"name": "MLFLOW_RUN_ID", "value": "1" * 32} in container["env"]
