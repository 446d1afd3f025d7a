"""Read the YAML of the training jobs: kinds, nodes, image, GPUs, tolerations and node selector.

Step `evaluate` needs the same kind of GPU and node as training. A PyTorchJob specifies them in its
pod template. For a TrainJob, they are merged from the job's runtime (another document) and the
job's podTemplateOverrides (Trainer 2.1) and runtimePatches (Trainer 2.2 and later); later entries
take precedence (maps are merged, lists of tolerations are replaced). The resources of spec.trainer
override the runtime's resources.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import yaml

from components.launcher import templates
from components.launcher.schema import GPU, validate
from components.launcher.status import expected_pods

KINDS = {kind.name: word for word, kind in templates.KINDS.items()}  # PyTorchJob -> pytorchjob
KUEUE = "kueue.x-k8s.io/"


def training_jobs(text: str) -> str:
    """Return a YAML stream's training jobs, as text, since kfp would turn integers into floats.

    Raises ValueError if the YAML or a job is invalid, if there is no training job, or if two jobs
    have the same kind.
    """
    parts = [part.strip("\n") for part in re.split(r"^---\s*$", text, flags=re.MULTILINE)]
    found: dict[str, str] = {}
    for part in parts:
        try:
            document = yaml.safe_load(part)
        except yaml.YAMLError as error:
            problem = " ".join(str(error).split())
            raise ValueError(f"the training jobs are invalid YAML: {problem}") from error
        kind = str(document.get("kind")) if isinstance(document, dict) else ""
        if kind in KINDS:
            if kind in found:
                raise ValueError(f"found two documents of kind {kind}, expected at most one")
            validate(document)
            found[kind] = part
    if not found:
        raise ValueError(
            f"the YAML contains no {' or '.join(KINDS)}; pass the output of "
            "`kubectl kustomize manifests/overlays/NAME`"
        )
    return "\n---\n".join(found[kind] for kind in KINDS if kind in found) + "\n"


def job_kinds(text: str) -> set[str]:
    """Return the job_kind of each training job. Raises the errors of `training_jobs`."""
    return {KINDS[job["kind"]] for job in yaml.safe_load_all(training_jobs(text))}


class Shape(NamedTuple):
    """A training job's number of nodes and its job_kind."""

    nodes: int = 1
    kind: str = "pytorchjob"


def job_shape(jobs: str) -> Shape:
    """Return the shape of the first job in the result of `training_jobs`."""
    job = documents_of(jobs)[0]
    return Shape(expected_pods(job), KINDS[job["kind"]])


def documents_of(text: str) -> list[dict]:
    """Return the documents of a YAML stream, validated and without nulls (see `validate`)."""
    return [validate(item) for item in yaml.safe_load_all(text) if isinstance(item, dict)]


def job_image(jobs: str) -> str:
    """Return the jobs' image. Raises ValueError if they use different images or no image."""
    found = set()
    for job in documents_of(jobs):
        for replica in job["spec"].get("pytorchReplicaSpecs", {}).values():
            found.add(replica["template"]["spec"]["containers"][0].get("image", ""))
        found |= {job["spec"].get("trainer", {}).get("image", "")} - {""}
    if len(found) != 1 or "" in found:
        got = " and ".join(image or "no image" for image in sorted(found)) or "no image"
        raise ValueError(
            f"expected one image for all training jobs, got {got}; set the image in the manifests, "
            "or VITDET_IMAGE for all steps"
        )
    return found.pop()


def queue_labels(jobs: str) -> dict[str, str]:
    """Return the jobs' Kueue labels, which also queue the pods of `evaluate`.

    Raises ValueError if these labels differ between the jobs.
    """
    labels = [job["metadata"].get("labels") or {} for job in documents_of(jobs)]
    found = [{key: label[key] for key in label if key.startswith(KUEUE)} for label in labels]
    if any(other != found[0] for other in found):
        got = " and ".join(map(str, found))
        raise ValueError(f"the training jobs must have the same labels {KUEUE}*, got {got}")
    return found[0]


class Accelerators(NamedTuple):
    """The number of GPUs of a pod, and the tolerations and node selector for GPU nodes."""

    gpus: int = 0
    tolerations: list[dict] = []
    selector: dict[str, str] = {}


def accelerators(text: str) -> Accelerators:
    """Return the accelerators of the training job in a YAML stream.

    If there are jobs of both kinds, uses the PyTorchJob, as overlays set the same GPUs for both.
    Raises ValueError if a TrainJob sets no resources and its runtime is not among the documents.
    """
    documents = documents_of(text)
    for job in documents:
        if job.get("kind") == "PyTorchJob":
            pod = next(iter(job["spec"]["pytorchReplicaSpecs"].values()))["template"]["spec"]
            return pod_accelerators(pod, pod["containers"][0].get("resources"))
    for job in documents:
        if job.get("kind") == "TrainJob":
            return trainjob_accelerators(job, documents)
    return Accelerators()


def pod_accelerators(pod: dict, resources: dict | None) -> Accelerators:
    """Return the accelerators from a pod's spec and its training container's resources."""
    limits = (resources or {}).get("limits") or {}
    return Accelerators(
        int(limits.get(GPU, 0)), pod.get("tolerations") or [], pod.get("nodeSelector") or {}
    )


def trainjob_accelerators(job: dict, documents: list[dict]) -> Accelerators:
    """Return the accelerators of a TrainJob's pods.

    They come from its runtime, if the documents contain it, its podTemplateOverrides or
    runtimePatches and its resourcesPerNode, each of which takes precedence over the previous.
    Raises the errors of `accelerators`.
    """
    wanted, trainer = job["spec"]["runtimeRef"], job["spec"].get("trainer") or {}
    kind, name = wanted.get("kind", "ClusterTrainingRuntime"), wanted["name"]
    runtime = next(
        (doc for doc in documents if doc.get("kind") == kind and doc["metadata"]["name"] == name),
        None,
    )
    resources = trainer.get("resourcesPerNode")
    if runtime is None and resources is None:
        raise ValueError(
            f"the TrainJob's {kind} {name} is not among the documents, so the GPUs and nodes for "
            "`evaluate` are unknown; pass the full output of `kubectl kustomize "
            "manifests/overlays/NAME/trainjob`, or set the job's spec.trainer.resourcesPerNode"
        )
    specs = [node_pod_spec(runtime["spec"])] if runtime else []
    for override in job["spec"].get("podTemplateOverrides") or []:
        if {"name": "node"} in (override.get("targetJobs") or []):
            specs.append(override.get("spec") or {})
    for patch in job["spec"].get("runtimePatches") or []:
        specs.append(node_pod_spec(patch.get("trainingRuntimeSpec", {})))
    pod: dict = {}
    for found in specs:
        pod["nodeSelector"] = {**pod.get("nodeSelector", {}), **(found.get("nodeSelector") or {})}
        pod["tolerations"] = found.get("tolerations") or pod.get("tolerations")
        pod["containers"] = pod.get("containers") or found.get("containers")
    containers: list[dict] = pod.get("containers") or []
    node: dict = next((container for container in containers if container["name"] == "node"), {})
    return pod_accelerators(pod, resources or node.get("resources"))


def node_pod_spec(spec: dict) -> dict:
    """Return the pod spec of the replicated job `node` in a runtime or runtime patch, else {}."""
    jobs = spec.get("template", {}).get("spec", {}).get("replicatedJobs") or []
    job: dict = next((item for item in jobs if item["name"] == "node"), {})
    return job.get("template", {}).get("spec", {}).get("template", {}).get("spec") or {}
