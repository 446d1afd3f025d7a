"""The step `train_job` on a real API server, called by KFP's executor; its job's pods are torchrun processes.

The input is JSON as the driver writes it: kubeflow/pipelines, backend/src/v2/driver/driver.go (TaskConfig and its field
names; unset fields are null) and k8s.go (a claim's volume has the claim's name; secrets and pod fields use `valueFrom`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from kfp.dsl.executor import Executor
from mlflow import MlflowClient

import components
from components.launcher import launch as launcher
from components.train import train_job
from tests.cluster.test_cluster_failures import both_pods, meanwhile
from tests.conftest import minimal
from tests.helpers.cluster import PATIENT, Scene, kubectl, on_cluster, scene, template, wait_until
from vitdet import stages
from vitdet.checkpoint import load_model_file

pytestmark = on_cluster
RUN, OTHER = "0b1c2d3e-1f3e-4b7e-9b1b-0d6c35f7a001", "9a8b7c6d-1f3e-4b7e-9b1b-0d6c35f7a001"
ZONE = {"key": "zone", "operator": "In", "values": ["a"]}
REQUIRED = {"nodeSelectorTerms": [{"matchExpressions": [ZONE]}]}
AFFINITY = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": REQUIRED}}
SPOT = {"key": "spot", "operator": "Equal", "value": "yes", "effect": "NoExecute"}
SPOT |= {"tolerationSeconds": 300}
SCRATCH = {"name": "scratch", "emptyDir": {"sizeLimit": "1Gi"}}


def given(workspace: str) -> dict:
    """Return task settings: those of the pipeline, and others that users may add to tasks."""
    secret = [
        {
            "name": name,
            "valueFrom": {"secretKeyRef": {"name": "vitdet-mlflow", "key": name, "optional": True}},
        }
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME")
    ]
    run = {
        "name": "KFP_RUN_ID",
        "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['pipeline/runid']"}},
    }
    return {
        "affinity": AFFINITY,
        "tolerations": [SPOT],
        "nodeSelector": {"disk": "fast"},
        "env": [{"name": "NCCL_DEBUG", "value": "INFO"}, *secret, run],
        "volumes": [
            {"name": "vitdet-data", "persistentVolumeClaim": {"claimName": "vitdet-data"}},
            SCRATCH,
        ],
        "volumeMounts": [
            {"name": "vitdet-data", "mountPath": workspace},
            {"name": "scratch", "mountPath": "/scratch"},
        ],
        "resources": {"limits": {"memory": "4Gi"}, "requests": {"cpu": "100m", "memory": "1Gi"}},
    }


class Step:
    """A workspace on the volume, after the steps configs, data and announce."""

    def __init__(self, made: Scene) -> None:
        self.made, self.workspace, self.out = made, str(made.volume), made.volume.parent / "out"
        self.settings = str(self.out / "settings")
        short = minimal(
            made.volume / "tiny", optim__steps=2, optim__warmup_steps=1, train__eval_every=2
        )
        (self.name,) = stages.resolve_configs(["tiny"], short, self.workspace, self.settings)
        self.data = stages.prepare_data(
            self.settings, self.workspace, str(self.out / "configs"), str(self.out / "manifest")
        ).fingerprint
        stages.start_parent_run(self.settings, self.workspace, RUN)

    def __call__(self, file: str) -> Path:
        """Run the step; return the checkpoint that it writes for the next step."""

        def artifact(kind: str, path: str) -> dict:
            schema = {"schemaTitle": f"system.{kind}"}
            return {"artifacts": [{"name": kind, "type": schema, "uri": path}]}

        checkpoint = self.out / file
        jobs = "---\n".join(template(kind) for kind in ("pytorchjob", "trainjob"))
        values = {
            "name": self.name,
            "data": self.data,
            "initial": "none",
            "workspace": self.workspace,
            "nodes": 2,
            "pool": "h200",
            "job_kind": "pytorchjob",
            "job": jobs,
            "image": "vitdet:1",
            "task_config": given(self.workspace),
        }
        inputs = {"settings": artifact("Artifact", self.settings)}
        outputs = {"checkpoint": artifact("Model", str(checkpoint))}
        request = {
            "inputs": {"parameterValues": values, "artifacts": inputs},
            "outputs": {"artifacts": outputs, "outputFile": str(self.out / "output.json")},
        }
        Executor(request, train_job).execute()
        return checkpoint


@pytest.fixture(scope="module")
def step(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Step]:
    with scene(tmp_path_factory.mktemp("step")) as made, pytest.MonkeyPatch.context() as patch:
        shutil.copytree(tiny, made.volume / "tiny")
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{made.volume / 'mlflow.db'}")
        patch.setenv("KUBECONFIG", str(made.kubeconfig))
        patch.setattr(launcher, "Timeouts", lambda: PATIENT)
        for name, value in made.step_pod("step").items():
            patch.setenv(name, value)
        yield Step(made)


def check_carried(pod: dict, workspace: str) -> None:
    """Assert that a pod has the job file's settings, and those of `given` that are not for the step's own pod."""
    spec, task = pod["spec"], given(workspace)
    container = spec["containers"][0]
    assert spec["affinity"] == AFFINITY and SPOT in spec["tolerations"]
    assert spec["nodeSelector"] == {"disk": "fast", "vitdet/pool": "h200"}
    environment = {variable["name"]: variable for variable in container["env"]}
    assert [environment[variable["name"]] for variable in task["env"][:-1]] == task["env"][:-1]
    assert "KFP_RUN_ID" not in environment and environment["HOME"]["value"] == "/tmp"
    assert SCRATCH in spec["volumes"]
    claimed = [volume["name"] for volume in spec["volumes"] if "persistentVolumeClaim" in volume]
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert len(claimed) == 1  # if a pod has two volumes of one claim, the second is never mounted
    found = (mounts["/data"], mounts[workspace], mounts["/scratch"])
    assert found == (claimed[0], claimed[0], "scratch")
    assert {"/tmp", "/dev/shm"} < set(mounts)
    assert container["image"] == "vitdet:1" and container["resources"]["limits"]["memory"] != "4Gi"


def test_the_step_trains_once_on_the_verified_data(
    step: Step, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made, pods = step.made, []
    monkeypatch.setenv(components.RUN_ID, RUN)
    with meanwhile(lambda: pods.extend(both_pods(made, step.name, RUN))):
        trained = step("model.pt")
    for pod in pods:
        check_carried(pod, step.workspace)
        # its process was started once
        assert len(made.node.containers[pod["metadata"]["name"]].lines) == 1
    assert "step 2/2" in capsys.readouterr().out and load_model_file(trained)["step"] == 2
    job = made.job(step.name, run=RUN)
    (owner,) = job["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"]) == ("Workflow", "run") and "controller" not in owner
    store = MlflowClient(f"sqlite:///{made.volume / 'mlflow.db'}")
    (parent,) = store.search_runs(["1"], f"tags.group = '{RUN}'")
    (run,) = store.search_runs(["1"], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert [metric.step for metric in store.get_metric_history(run.info.run_id, "loss")] == [1, 2]

    processes = set(made.node.containers)
    kubectl(f"delete pytorchjob -n {made.namespace} {job['metadata']['name']} --wait=false")
    wait_until(lambda: made.job(step.name, run=RUN) is None)
    # KFP retries a step that had completed
    assert step("again.pt").read_bytes() == trained.read_bytes()
    assert made.job(step.name, run=RUN) is None and set(made.node.containers) == processes


def test_no_job_is_created_for_unverified_data(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(components.RUN_ID, OTHER)
    file = step.made.volume / "tiny" / "annotations" / "instances_train.json"
    before = file.read_text()
    file.write_text(before.replace('"iscrowd": 0', '"iscrowd": 1', 1))
    with pytest.raises(ValueError, match="changed since it was verified"):
        step("changed.pt")
    file.write_text(before)
    (step.made.volume / "tiny").rename(step.made.volume / "elsewhere")
    with pytest.raises(FileNotFoundError, match="removed after the data was verified"):
        step("wiped.pt")
    (step.made.volume / "elsewhere").rename(step.made.volume / "tiny")
    assert step.made.job(step.name, run=OTHER) is None and not step.made.pods(step.name, OTHER)
