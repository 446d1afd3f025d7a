"""components/profile: a Kubeflow profile's user may apply all that is left, and overwrites no other profile's."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.launcher.templates import KINDS, JobRequest, fill_template
from tests.cluster.test_manifests import CLOUDS, build, copy, overlay, pools, pytestmark
from tests.helpers.manifests import kustomize, pods, problems

__all__ = ["copy", "pytestmark"]  # a fixture and a mark of the whole file
WIDE = {
    "gke": {"ComputeClass"},
    "eks": {"NodePool", "EC2NodeClass", "StorageClass"},
    "onprem": set(),
}


def cluster_wide(documents: list[dict]) -> dict[str, dict]:
    """What has no namespace: kind -> metadata."""
    return {
        document["kind"]: document["metadata"]
        for document in documents
        if "namespace" not in document["metadata"]
    }


def before(name: str) -> list[str]:
    return ["node-pools/onprem"] if name == "onprem" else []


def after(name: str) -> list[str]:
    return ["node-pools/gke/job"] if name == "gke" else []


def pool(name: str) -> list[str]:
    return [f"node-pools/{name}"] if name != "onprem" else []


@pytest.mark.parametrize("name", CLOUDS)
def test_nothing_cluster_wide_is_left(name: str, copy: Path) -> None:
    cluster = build(
        copy,
        name,
        ["shared", "mlflow"],
        [*pool(name), "components/kueue-queues", "components/profile", "components/values"],
    )
    jobs = build(
        copy,
        name,
        ["pytorchjob", "trainjob"],
        [
            *before(name),
            "components/rdma",
            "components/coscheduling",
            "components/kueue",
            "components/profile",
            "components/values",
            *after(name),
        ],
    )
    assert cluster_wide([*cluster, *jobs]) == {}
    # the administrator's
    classes = [one for one in overlay(name, "cluster") if one["kind"] == "StorageClass"]
    assert problems([*cluster, *classes], jobs, pools(name)) == []
    assert {"LocalQueue", "PersistentVolumeClaim", "StatefulSet"} <= {
        document["kind"] for document in cluster
    }
    runtime, trainjob = (
        one for kind in ("TrainingRuntime", "TrainJob") for one in jobs if one["kind"] == kind
    )
    assert trainjob["spec"]["runtimeRef"] == {"kind": "TrainingRuntime", "name": "vitdet-gpu-train"}
    ((_, pod),) = pods([runtime])  # the other options have reached it under its new kind
    assert "rdma/rdma_shared_device_a" in pod["spec"]["containers"][0]["resources"]["limits"]
    assert (
        "coscheduling" in runtime["spec"]["podGroupPolicy"]
        and "priorityClassName" not in pod["spec"]
    )


@pytest.mark.parametrize("name", CLOUDS)
def test_the_administrator_s_part_has_a_label(name: str, copy: Path) -> None:
    whole = build(
        copy,
        name,
        ["shared", "mlflow", "trainjob"],
        [*pool(name), *before(name), "components/kueue-queues", "components/values", *after(name)],
    )
    wide = cluster_wide(whole)
    assert wide.keys() == {
        "Namespace",
        "PriorityClass",
        "ClusterTrainingRuntime",
        "ClusterQueue",
        "ResourceFlavor",
        "WorkloadPriorityClass",
        *WIDE[name],
    }
    labelled = {
        kind for kind, about in wide.items() if about["labels"].get("vitdet/scope") == "cluster"
    }
    assert labelled == wide.keys() - {"Namespace"}


def test_two_profiles_share_nothing_but_the_pool(copy: Path) -> None:
    file = copy / "overlays" / "eks" / "values" / "values.yaml"
    made = []
    for space in ("team-a", "team-b"):
        file.write_text(
            file.read_text()
            .replace("namespace: vitdet ", f"namespace: {space} ")
            .replace("namespace: team-a ", f"namespace: {space} ")
        )
        made.append(
            build(
                copy,
                "eks",
                ["shared", "mlflow", "trainjob"],
                [
                    "node-pools/eks",
                    "components/kueue-queues",
                    "components/profile",
                    "components/values",
                ],
            )
        )
        queue = build(copy, "eks", ["shared"], ["components/kueue-queues", "components/values"])
        assert {one["metadata"]["name"] for one in queue if one["kind"] == "ClusterQueue"} == {
            space
        }
        assert {one["spec"]["clusterQueue"] for one in made[-1] if one["kind"] == "LocalQueue"} == {
            space
        }
    places = [
        {(one["kind"], one["metadata"]["namespace"], one["metadata"]["name"]) for one in each}
        for each in made
    ]
    assert not places[0] & places[1] and len(places[0]) == len(places[1]) > 15


def test_the_launcher_s_trainjob_keeps_the_profile_s_runtime(copy: Path) -> None:
    (runtime, job) = kustomize(copy / "overlays" / "kind" / "trainjob")
    request = JobRequest("vitdet-x", "kubeflow", {}, "", ["train"], 2, "", {})
    made = fill_template(yaml.safe_dump_all([runtime, job]), KINDS["trainjob"], request)
    assert made["spec"]["runtimeRef"] == {
        "kind": "TrainingRuntime",
        "name": runtime["metadata"]["name"],
    }
    assert runtime["metadata"]["namespace"] == made["metadata"]["namespace"]
