"""A Kubeflow profile's namespace: one value selects it, and its owner can apply everything in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.test_manifests import CLOUDS, build, installed, pools
from tests.helpers.manifests import kustomize, needs_kubectl, pods, problems

pytestmark = needs_kubectl
# folders of an overlay that a profile's owner applies
OWNER = ("namespace", "data", ".", "trainjob")


def for_profile(root: Path, name: str, profile: str, mlflow: str = "vitdet-mlflow") -> Path:
    """Edit an overlay's values for a profile; return the overlay's folder."""
    folder = root / "overlays" / name
    file = folder / "values" / "values.yaml"
    text = re.sub(r"(?m)^  namespace: [\w-]+", f"  namespace: {profile}", file.read_text())
    file.write_text(re.sub(r"(?m)^  mlflowNamespace: [\w-]+", f"  mlflowNamespace: {mlflow}", text))
    return folder


@pytest.mark.parametrize("name", CLOUDS)
def test_one_value_moves_everything_into_the_profile(name: str, copy: Path) -> None:
    folder = for_profile(copy, name, "team-a")
    mine = [document for part in OWNER for document in kustomize(folder / part)]
    assert {document["metadata"].get("namespace") for document in mine} == {"team-a"}
    jobs = [
        document
        for document in mine
        if document["kind"] in ("PyTorchJob", "TrainJob", "TrainingRuntime")
    ]
    assert len(jobs) == 3
    everything = installed(name, copy)
    assert problems(everything, jobs, pools(name)) == []
    runtime, trainjob = jobs[1:]
    assert trainjob["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": "vitdet-gpu-train"}
    assert runtime["metadata"]["namespace"] == "team-a"
    # the administrator does not apply the profile's Namespace, and creates MLflow's by a command
    wide = [document for part in ("cluster", "mlflow") for document in kustomize(folder / part)]
    assert not [document for document in wide if document["kind"] == "Namespace"]


@pytest.mark.parametrize("name", CLOUDS)
def test_mlflow_may_run_in_the_profile_itself(name: str, copy: Path) -> None:
    folder = for_profile(copy, name, "team-a", mlflow="team-a")
    everything = installed(name, copy)
    assert problems(everything, kustomize(folder), pools(name)) == []
    assert {document["metadata"].get("namespace", "team-a") for document in everything} == {
        "team-a"
    }
    (server,) = (document for document in everything if document["kind"] == "Deployment")
    assert "mlflow.team-a.svc:5000,localhost:5000" in str(server)


def test_two_profiles_share_nothing_but_the_pool(copy: Path) -> None:
    made = []
    for space in ("team-a", "team-b"):
        folder = for_profile(copy, "eks", space, f"{space}-mlflow")
        documents = [
            document for part in (*OWNER, "mlflow") for document in kustomize(folder / part)
        ]
        queue = build(copy, "eks", [], ["components/kueue-queues", "components/values"])
        names = [
            document["metadata"]["name"] for document in queue if document["kind"] == "ClusterQueue"
        ]
        assert names == [space]
        documents += [document for document in queue if document["kind"] == "LocalQueue"]
        assert documents[-1]["spec"]["clusterQueue"] == space
        about = [(document["kind"], document["metadata"]) for document in documents]
        made.append(
            {(kind, metadata.get("namespace"), metadata["name"]) for kind, metadata in about}
        )
    assert not made[0] & made[1] and len(made[0]) == len(made[1]) > 15


@pytest.mark.parametrize("name", CLOUDS)
def test_cluster_scoped_objects_are_in_the_administrators_folder(name: str, copy: Path) -> None:
    folder = copy / "overlays" / name
    for part in (*OWNER, "mlflow"):
        assert not [
            document
            for document in kustomize(folder / part)
            if "namespace" not in document["metadata"]
        ]
    for document in kustomize(folder / "cluster"):
        assert "namespace" not in document["metadata"] and document["kind"] != "Namespace"


def test_the_priority_class_of_jobs_is_optional(copy: Path) -> None:
    parts = ["components/no-priority-class", "components/values"]
    found = list(pods(build(copy, "eks", ["pytorchjob", "trainjob"], parts)))
    assert len(found) == 3
    assert not [pod for _, pod in found if "priorityClassName" in pod["spec"]]
