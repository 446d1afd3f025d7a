"""The namespace of a Kubeflow profile: one value selects it, and its owner may apply all that is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.cluster.test_manifests import CLOUDS, build, installed, pools
from tests.helpers.manifests import kustomize, needs_kubectl, pods, problems

pytestmark = needs_kubectl
# Folders of an overlay that the owner of a profile applies.
OWNER = ("namespace", "data", ".", "trainjob")


def for_profile(root: Path, name: str, profile: str, mlflow: str = "vitdet-mlflow") -> Path:
    """Make the one edit of an overlay's values; its folder."""
    folder = root / "overlays" / name
    file = folder / "values" / "values.yaml"
    text = re.sub(r"(?m)^  namespace: [\w-]+", f"  namespace: {profile}", file.read_text())
    file.write_text(re.sub(r"(?m)^  mlflowNamespace: [\w-]+", f"  mlflowNamespace: {mlflow}", text))
    return folder


@pytest.mark.parametrize("name", CLOUDS)
def test_one_value_puts_all_into_the_profile(name: str, copy: Path) -> None:
    folder = for_profile(copy, name, "team-a")
    mine = [document for part in OWNER for document in kustomize(folder / part)]
    assert {document["metadata"].get("namespace") for document in mine} == {"team-a"}
    jobs = [item for item in mine if item["kind"] in ("PyTorchJob", "TrainJob", "TrainingRuntime")]
    assert len(jobs) == 3
    everything = installed(name, copy)
    assert problems(everything, jobs, pools(name)) == []
    runtime, trainjob = jobs[1:]
    assert trainjob["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": "vitdet-gpu-train"}
    assert runtime["metadata"]["namespace"] == "team-a"
    # the administrator leaves the profile's Namespace alone, and MLflow's is created by hand
    wide = [item for part in ("cluster", "mlflow") for item in kustomize(folder / part)]
    assert not [item for item in wide if item["kind"] == "Namespace"]


@pytest.mark.parametrize("name", CLOUDS)
def test_mlflow_in_the_profile_itself(name: str, copy: Path) -> None:
    folder = for_profile(copy, name, "team-a", mlflow="team-a")
    everything = installed(name, copy)
    assert problems(everything, kustomize(folder), pools(name)) == []
    assert {item["metadata"].get("namespace", "team-a") for item in everything} == {"team-a"}
    (server,) = (item for item in everything if item["kind"] == "Deployment")
    assert "mlflow.team-a.svc:5000,localhost:5000" in str(server)


def test_two_profiles_share_nothing_but_the_pool(copy: Path) -> None:
    made = []
    for space in ("team-a", "team-b"):
        folder = for_profile(copy, "eks", space, f"{space}-mlflow")
        documents = [item for part in (*OWNER, "mlflow") for item in kustomize(folder / part)]
        queue = build(copy, "eks", [], ["components/kueue-queues", "components/values"])
        names = [item["metadata"]["name"] for item in queue if item["kind"] == "ClusterQueue"]
        assert names == [space]
        documents += [item for item in queue if item["kind"] == "LocalQueue"]
        assert documents[-1]["spec"]["clusterQueue"] == space
        about = [(item["kind"], item["metadata"]) for item in documents]
        made.append({(kind, meta.get("namespace"), meta["name"]) for kind, meta in about})
    assert not made[0] & made[1] and len(made[0]) == len(made[1]) > 15


@pytest.mark.parametrize("name", CLOUDS)
def test_cluster_scoped_objects_are_in_the_administrator_s_folder(name: str, copy: Path) -> None:
    folder = copy / "overlays" / name
    for part in (*OWNER, "mlflow"):
        assert not [
            item for item in kustomize(folder / part) if "namespace" not in item["metadata"]
        ]
    for document in kustomize(folder / "cluster"):
        assert "namespace" not in document["metadata"] and document["kind"] != "Namespace"


def test_jobs_without_a_priority_class(copy: Path) -> None:
    parts = ["components/no-priority-class", "components/values"]
    found = list(pods(build(copy, "eks", ["pytorchjob", "trainjob"], parts)))
    assert len(found) == 3
    assert not [pod for _, pod in found if "priorityClassName" in pod["spec"]]
