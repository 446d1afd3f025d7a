"""Training on two nodes through a real API server: by kubectl, by the launcher, with a killed worker.

The pods are local torchrun processes with the environment variables that the operators set.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from components.launcher.templates import job_name
from tests.cluster.test_cluster_failures import meanwhile
from tests.conftest import ROOT, STEPS, minimal, options
from tests.helpers.cluster import (
    PIPELINE_RUN,
    Scene,
    job_containers,
    kubectl,
    on_cluster,
    scene,
    template,
    wait_until,
)
from tests.helpers.manifests import kustomize
from vitdet.checkpoint import load_model_file

pytestmark = on_cluster


@pytest.fixture(scope="module")
def training(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """Return a scene whose volume has the data set and MLflow's database, which takes seconds to create."""
    folder = tmp_path_factory.mktemp("cluster")
    with scene(folder) as made:
        shutil.copytree(tiny, made.volume / "tiny")
        MlflowClient(f"sqlite:///{made.volume / 'mlflow.db'}").search_experiments()
        yield made


def words(name: str, **changes: object) -> list[str]:
    """Return a job's args: train the smallest model for a few steps, with output in /data/NAME."""
    settings = options(minimal("/data/tiny", **changes))
    return ["train", "tiny", *settings, "--output", f"/data/{name}"]


def runs(made: Scene, name: str) -> list:
    """Return the MLflow runs of an output folder's training run, found by its learning rate."""
    store = MlflowClient(f"sqlite:///{made.volume / 'mlflow.db'}")
    stored = load_model_file(made.volume / name / "model.pt")
    found = store.search_runs(
        [experiment.experiment_id for experiment in store.search_experiments()]
    )
    rate = str(stored["config"]["optim"]["lr"])
    return [run for run in found if run.data.params["optim.lr"] == rate]


def points(made: Scene, run: object, key: str = "loss") -> list[int]:
    store = MlflowClient(f"sqlite:///{made.volume / 'mlflow.db'}")
    return [metric.step for metric in store.get_metric_history(run.info.run_id, key)]


def test_kubectl_apply_alone_trains_on_two_nodes(training: Scene) -> None:
    job = yaml.safe_load(template())
    job["metadata"]["namespace"] = training.namespace
    for container in job_containers(job):
        container["args"] = words("applied", optim__lr=1e-3)
    kubectl("apply -f -", given=job)
    where = f"-n {training.namespace} pytorchjob/vitdet-train"
    kubectl(f"wait --for=condition=Succeeded {where} --timeout=120s")
    check_finished(training, "applied")
    log = kubectl(f"logs -n {training.namespace} vitdet-train-master-0")
    assert f"step {STEPS}/{STEPS}" in log and "/applied/model.pt" in log
    environment = training.node.containers["vitdet-train-worker-0"].environment
    wanted = {"PET_NNODES": "2", "PET_NODE_RANK": "1", "WORLD_SIZE": "2", "RANK": "1"}
    assert wanted.items() <= environment.items()


def test_a_killed_worker_costs_only_the_steps_since_the_last_checkpoint(training: Scene) -> None:
    name = job_name(PIPELINE_RUN, "tiny")

    def kill() -> None:
        """Send SIGKILL to the worker and its torchrun in the second half of the steps."""
        wait_until(lambda: f"{name}-master-0" in training.node.containers, 60)
        lines = training.node.containers[f"{name}-master-0"].lines[0]
        wait_until(lambda: any(f"step 5/{STEPS}" in line for _, line in lines), 120)
        training.node.containers[f"{name}-worker-0"].kill(signal.SIGKILL)

    with meanwhile(kill):
        training.launch(template(), words("killed", optim__lr=2e-3))
    text = "\n".join(training.lines)
    pods = training.node.containers.items()
    assert all(container.restarts for key, container in pods if key.startswith(name)), text
    where = f"pod {name}-worker-0 on node {training.node.name}"
    restarted = "Error, exit code 137 (SIGKILL); restarted (restarts so far: 1)"
    assert f"{where}: {restarted}" in text
    check_resumed(training, "killed")


def check_resumed(made: Scene, name: str) -> None:
    """Assert that the same MLflow run resumed from a checkpoint, and that each step is logged once."""
    text = "\n".join(made.lines)
    assert f"of {STEPS} (/" in text.replace(str(made.volume), "/data"), text
    assert text.count(f"step {STEPS}/{STEPS}  box") == 1
    check_finished(made, name)


def check_finished(made: Scene, name: str) -> None:
    assert load_model_file(made.volume / name / "model.pt")["step"] == STEPS
    (run,) = runs(made, name)
    assert run.info.status == "FINISHED" and points(made, run) == list(range(1, STEPS + 1))


def test_the_launcher_trains_with_a_trainjob(training: Scene) -> None:
    training.lines.clear()
    runtime, _ = kustomize(ROOT / "manifests" / "overlays" / "kind" / "trainjob")
    runtime["metadata"]["namespace"] = training.namespace
    kubectl("apply -f -", given=runtime)
    args = words("trained", optim__lr=3e-3)
    training.launch(template("trainjob"), args, recipe="second", kind="trainjob")
    text = "\n".join(training.lines)
    assert f"step {STEPS}/{STEPS}" in text and "TrainJob vitdet-second" in text
    assert text.count("step 1/") == 1
    assert training.job("second", "trainjob")["status"]["conditions"][-1]["type"] == "Complete"
    check_finished(training, "trained")


def elastic(folder: Path) -> str:
    """Return the PyTorchJob of overlays/kind with components/elastic."""
    overlay = shutil.copytree(ROOT / "manifests", folder / "manifests") / "overlays" / "kind"
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text().rstrip() + "\n  - ../../components/elastic\n")
    (job,) = (document for document in kustomize(overlay) if document["kind"] == "PyTorchJob")
    del job["metadata"]["annotations"]
    return yaml.safe_dump(job)


def test_an_elastic_job_continues_after_a_worker_is_killed(training: Scene, tmp_path: Path) -> None:
    """The other pod's torchrun waits at the c10d rendezvous and restarts its process."""
    name, training.lines[:] = job_name(PIPELINE_RUN, "elastic"), []

    def kill() -> None:
        """Do not wait for the launcher's log: after the last step torchrun waits 5 minutes for its peer."""
        wait_until(
            lambda: any(
                f"step 5/{STEPS}" in line
                for pod, container in list(training.node.containers.items())
                if pod.startswith(name)
                for _, line in container.lines[0]
            ),
            120,
        )
        training.node.containers[f"{name}-worker-1"].kill(signal.SIGKILL)

    with meanwhile(kill):
        training.launch(elastic(tmp_path), words("elastic", optim__lr=4e-3), recipe="elastic")
    text = "\n".join(training.lines)
    pods = {
        key: container
        for key, container in training.node.containers.items()
        if key.startswith(name)
    }
    restarts = {key[-8:]: container.restarts for key, container in pods.items()}
    assert restarts == {"worker-0": 0, "worker-1": 1}, text
    assert pods[f"{name}-worker-0"].environment["PET_NNODES"] == "1:2"
    assert text.count("step 1/") == 1  # in all logs: rank 0 may move to the other pod
    check_resumed(training, "elastic")
