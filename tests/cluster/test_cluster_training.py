"""Training on two nodes through a real API server: kubectl alone, the launcher, a killed worker; both kinds.

The pods are local torchrun processes with the environment that the operators set.
"""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from mlflow import MlflowClient

from components.launcher.templates import job_name
from tests.conftest import ROOT, STEPS, minimal, options
from tests.helpers.cluster import (
    PIPELINE_RUN,
    Scene,
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
    """A scene whose volume has the data set; and MLflow's tables, which take seconds to make."""
    folder = tmp_path_factory.mktemp("cluster")
    with scene(folder) as made:
        shutil.copytree(tiny, made.volume / "tiny")
        MlflowClient(f"sqlite:///{made.volume / 'mlflow.db'}").search_experiments()
        yield made


def words(name: str, **changes: object) -> list[str]:
    """args of a job: train the smallest model for some steps into /data/NAME."""
    return [
        "train",
        "tiny",
        *options(minimal("/data/tiny", **changes)),
        "--output",
        f"/data/{name}",
    ]


def runs(made: Scene, name: str) -> list:
    """The MLflow runs of an output folder's training, which its learning rate tells from the others."""
    store = MlflowClient(f"sqlite:///{made.volume / 'mlflow.db'}")
    stored = load_model_file(made.volume / name / "model.pt")
    found = store.search_runs([one.experiment_id for one in store.search_experiments()])
    return [
        run for run in found if run.data.params["optim.lr"] == str(stored["config"]["optim"]["lr"])
    ]


def points(made: Scene, run: object, key: str = "loss") -> list[int]:
    store = MlflowClient(f"sqlite:///{made.volume / 'mlflow.db'}")
    return [one.step for one in store.get_metric_history(run.info.run_id, key)]


def test_kubectl_apply_alone_trains_on_two_nodes(training: Scene) -> None:
    job = yaml.safe_load(template())
    job["metadata"]["namespace"] = training.namespace
    for replica in job["spec"]["pytorchReplicaSpecs"].values():
        replica["template"]["spec"]["containers"][0]["args"] = words("applied", optim__lr=1e-3)
    kubectl("apply -f -", given=job)
    kubectl(
        f"wait --for=condition=Succeeded -n {training.namespace} pytorchjob/vitdet-train --timeout=120s"
    )
    assert load_model_file(training.volume / "applied" / "model.pt")["step"] == STEPS
    log = kubectl(f"logs -n {training.namespace} vitdet-train-master-0")
    assert f"step {STEPS}/{STEPS}" in log and "/applied/model.pt" in log
    (run,) = runs(training, "applied")
    assert run.info.status == "FINISHED" and points(training, run) == list(range(1, STEPS + 1))
    environment = training.node.containers["vitdet-train-worker-0"].environment
    assert {
        key: environment[key] for key in ("PET_NNODES", "PET_NODE_RANK", "WORLD_SIZE", "RANK")
    } == {"PET_NNODES": "2", "PET_NODE_RANK": "1", "WORLD_SIZE": "2", "RANK": "1"}


def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(training: Scene) -> None:
    name = job_name(PIPELINE_RUN, "tiny")

    def kill() -> None:
        """SIGKILL for worker and its torchrun in the second half."""
        wait_until(lambda: f"{name}-master-0" in training.node.containers, 60)
        lines = training.node.containers[f"{name}-master-0"].lines[0]
        wait_until(lambda: any(f"step 5/{STEPS}" in line for _, line in lines), 120)
        training.node.containers[f"{name}-worker-0"].kill(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    training.launch(template(), words("killed", optim__lr=2e-3))
    killer.join()
    text = "\n".join(training.lines)
    assert all(
        container.restarts
        for key, container in training.node.containers.items()
        if key.startswith(name)
    ), text
    assert (
        f"pod {name}-worker-0 on node {training.node.name}: Error, exit code 137 (SIGKILL); "
        "restarted (restarts so far: 1)" in text
    )
    # it went on from a checkpoint
    assert f"of {STEPS} (/" in text.replace(str(training.volume), "/data"), text
    # each line once, through both lives of the container
    assert text.count(f"step {STEPS}/{STEPS}  box") == 1
    assert load_model_file(training.volume / "killed" / "model.pt")["step"] == STEPS
    (run,) = runs(training, "killed")  # the same run went on
    assert run.info.status == "FINISHED" and points(training, run) == list(range(1, STEPS + 1))


def test_a_trainjob_trains_behind_the_same_launcher(training: Scene) -> None:
    training.lines.clear()
    runtime, _ = kustomize(ROOT / "manifests" / "overlays" / "kind" / "trainjob")
    runtime["metadata"]["namespace"] = training.namespace
    kubectl("apply -f -", given=runtime)
    training.launch(
        template("trainjob"), words("trained", optim__lr=3e-3), recipe="second", kind="trainjob"
    )
    text = "\n".join(training.lines)
    assert f"step {STEPS}/{STEPS}" in text and "TrainJob vitdet-second" in text
    assert text.count("step 1/") == 1
    assert training.job("second", "trainjob")["status"]["conditions"][-1]["type"] == "Complete"
    assert load_model_file(training.volume / "trained" / "model.pt")["step"] == STEPS


def elastic(folder: Path) -> str:
    """The job of the kind overlay with components/elastic."""
    overlay = shutil.copytree(ROOT / "manifests", folder / "manifests") / "overlays" / "kind"
    file = overlay / "kustomization.yaml"
    file.write_text(file.read_text().rstrip() + "\n  - ../../components/elastic\n")
    (job,) = (one for one in kustomize(overlay) if one["kind"] == "PyTorchJob")
    del job["metadata"]["annotations"]
    return yaml.safe_dump(job)


def test_an_elastic_job_goes_on_when_a_worker_was_killed(training: Scene, tmp_path: Path) -> None:
    """The other one's torchrun stays, waits for it at the c10d rendezvous, and starts its process again."""
    name, training.lines[:] = job_name(PIPELINE_RUN, "elastic"), []

    def kill() -> None:
        """At once, not when the launcher tells: of a training that is over torchrun waits 5 minutes for the other's."""
        wait_until(
            lambda: any(
                f"step 5/{STEPS}" in line
                for pod, one in list(training.node.containers.items())
                if pod.startswith(name)
                for _, line in one.lines[0]
            ),
            120,
        )
        training.node.containers[f"{name}-worker-1"].kill(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    training.launch(elastic(tmp_path), words("elastic", optim__lr=4e-3), recipe="elastic")
    killer.join()
    text = "\n".join(training.lines)
    pods = {key: one for key, one in training.node.containers.items() if key.startswith(name)}
    assert {key[-8:]: one.restarts for key, one in pods.items()} == {
        "worker-0": 0,
        "worker-1": 1,
    }, text
    assert pods[f"{name}-worker-0"].environment["PET_NNODES"] == "1:2"
    # it went on from a checkpoint
    assert f"of {STEPS} (/" in text.replace(str(training.volume), "/data"), text
    # of whichever pod is rank 0
    assert text.count("step 1/") == 1 and text.count(f"step {STEPS}/{STEPS}  box") == 1
    assert load_model_file(training.volume / "elastic" / "model.pt")["step"] == STEPS
    (run,) = runs(training, "elastic")
    assert run.info.status == "FINISHED" and points(training, run) == list(range(1, STEPS + 1))
