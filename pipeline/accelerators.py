"""What `evaluate` needs to run where jobs train: a GPU, the tolerations of its node, the selector of its pool.

A PyTorchJob says it itself. A TrainJob says it in parts, the later over the earlier: its runtime, which is another
document; spec.trainer; its runtimePatches (Trainer 2.3: maps are merged, a list of tolerations replaces the other).
"""

from __future__ import annotations

from typing import NamedTuple

import yaml

GPU = "nvidia.com/gpu"


class Accelerators(NamedTuple):
    """GPUs of a pod, and what lets a pod onto their nodes."""

    gpus: int = 0
    tolerations: list[dict] = []
    selector: dict[str, str] = {}


def accelerators(text: str) -> Accelerators:
    """Of the training job in a YAML stream; of two kinds the PyTorchJob, since one overlay says the same in both.

    Raises ValueError when a TrainJob's runtime is not among the documents and it does not say itself what it takes.
    """
    documents = [document for document in yaml.safe_load_all(text) if isinstance(document, dict)]
    for job in documents:
        if job.get("kind") == "PyTorchJob":
            pod = next(iter(job["spec"]["pytorchReplicaSpecs"].values()))["template"]["spec"]
            return of_pod(pod, pod["containers"][0].get("resources"))
    for job in documents:
        if job.get("kind") == "TrainJob":
            return of_trainjob(job, documents)
    return Accelerators()


def of_pod(pod: dict, resources: dict | None) -> Accelerators:
    """Of a pod's spec and the resources of its training container."""
    limits = (resources or {}).get("limits") or {}
    return Accelerators(
        int(limits.get(GPU, 0)), pod.get("tolerations") or [], pod.get("nodeSelector") or {}
    )


def of_trainjob(job: dict, documents: list[dict]) -> Accelerators:
    """Of a TrainJob and of its runtime, where that is among the documents. Raises as `accelerators` does."""
    wanted, trainer = job["spec"]["runtimeRef"], job["spec"].get("trainer") or {}
    kind, name = wanted.get("kind", "ClusterTrainingRuntime"), wanted["name"]
    runtime = next(
        (one for one in documents if one.get("kind") == kind and one["metadata"]["name"] == name),
        None,
    )
    resources = trainer.get("resourcesPerNode")
    if runtime is None and resources is None:
        raise ValueError(
            f"the TrainJob's {kind} {name} is not among the documents, so that nobody says what GPUs and "
            "nodes `evaluate` needs; give all that `kubectl kustomize manifests/overlays/NAME/trainjob` "
            "prints, or set the job's spec.trainer.resourcesPerNode"
        )
    pod: dict = {}
    for spec in ([runtime["spec"]] if runtime else []) + [
        one["trainingRuntimeSpec"] for one in job["spec"].get("runtimePatches") or []
    ]:
        found = node(spec)
        pod["nodeSelector"] = {**pod.get("nodeSelector", {}), **(found.get("nodeSelector") or {})}
        pod["tolerations"] = found.get("tolerations") or pod.get("tolerations")
        pod["containers"] = pod.get("containers") or found.get("containers")
    own = next((one for one in pod.get("containers") or [] if one["name"] == "node"), {})
    return of_pod(pod, resources or own.get("resources"))


def node(spec: dict) -> dict:
    """The pod's spec of the replicated job `node` in a runtime or in a patch of one; empty where it says nothing."""
    jobs = spec.get("template", {}).get("spec", {}).get("replicatedJobs") or []
    job = next((one for one in jobs if one["name"] == "node"), {})
    return job.get("template", {}).get("spec", {}).get("template", {}).get("spec") or {}
