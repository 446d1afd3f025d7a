"""The two kinds of training job as plain dictionaries, and how to fill in their templates.

The kinds are PyTorchJob (kubeflow.org/v1, training operator 1.9) and its successor TrainJob
(trainer.kubeflow.org/v1alpha1, Kubeflow Trainer 2.1 or later); see KINDS.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from components.launcher.schema import GPU, validate

POOL = "vitdet/pool"  # node label with the name of the node pool
# node label that replaces POOL on GKE: a ComputeClass cannot add node labels with a slash
COMPUTE_CLASS = "cloud.google.com/compute-class"
RUN, RECIPE = "vitdet/run", "vitdet/recipe"  # labels of a job and its pods
# annotation of a job template: maximum time in seconds that the pods may wait for a node
SCHEDULE = "vitdet/schedule-seconds"
# annotations that the launcher sets on a job
FAILURE = "vitdet/failure"  # why the job failed or was aborted
RESTARTS = "vitdet/restarts"  # how many restarts are allowed after errors (not disruptions)
ERRORS, STARTED = "vitdet/errors", "vitdet/started"  # number of errors; whether all pods have run
# defaults in seconds: maximum run time, and how long a finished job is kept
DEFAULT_DEADLINE, DEFAULT_TTL = 14 * 24 * 3600, 7 * 24 * 3600


@dataclass(frozen=True)
class JobRequest:
    """The values that are filled into a job's template.

    task: settings of the pipeline's task, as the fields of kfp's dsl.TaskConfig: affinity,
    tolerations, node_selector, env, volumes, volume_mounts, resources; each None or in the format
    of the Kubernetes API.
    owner: an ownerReference; the job is deleted together with this owner.
    """

    name: str
    namespace: str
    labels: dict[str, str]
    image: str
    args: list[str]
    nodes: int
    pool: str
    task: dict = field(default_factory=dict)
    owner: dict | None = None

    @property
    def program(self) -> dict[str, Any]:
        """Return the container's arguments, and its image if the request sets one."""
        return {"args": self.args, **({"image": self.image} if self.image else {})}


@dataclass(frozen=True)
class Kind:
    """A kind of job: its API resource, the labels of its pods, how its template is filled in.

    phases: (condition type, phase), highest priority first.
    rank0: returns the labels of the pods that may run rank 0.
    halt: a patch of the spec that makes the operator delete the pods but keep the job.
    """

    name: str
    group: str
    version: str
    plural: str
    operator: str
    container: str
    job_label: str
    phases: tuple[tuple[str, str], ...]
    fill: Callable[[dict, JobRequest], None]
    rank0: Callable[[dict], dict[str, str]]
    halt: dict

    def selector(self, name: str) -> str:
        """Return the label selector of a job's pods."""
        return f"{self.job_label}={name}"


def job_name(run_id: str, recipe: str) -> str:
    """Return a job's name: a DNS-1035 label of at most 40 characters, unique for these arguments.

    recipe: the training run's name. Pod names add a suffix and must be at most 63 characters long.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")[:22].strip("-")
    mark = hashlib.sha256(f"{run_id}/{recipe}".encode()).hexdigest()[:10]
    return "-".join(part for part in ("vitdet", slug, mark) if part)


def label(text: str) -> str:
    """Convert text to a label value: invalid characters become `-`; at most 63 characters."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63].strip("-._")


def fill_template(template: str, kind: Kind, request: JobRequest) -> dict:
    """Return a template's job, with the request's values filled in.

    Raises ValueError if the template does not fit the request or does not contain exactly one job
    of this kind.
    """
    if request.nodes < 1:
        raise ValueError(f"a job needs at least 1 node, got {request.nodes}")
    found = [validate(part) for part in yaml.safe_load_all(template) if isinstance(part, dict)]
    jobs = [part for part in found if part.get("kind") == kind.name]
    if len(jobs) != 1:
        raise ValueError(
            f"the job's template must contain exactly one {kind.name}, got "
            f"{', '.join(str(part.get('kind')) for part in found) or 'nothing'}"
        )
    # copy: with YAML anchors, Master and Worker may share objects
    job = json.loads(json.dumps(jobs[0]))
    metadata = job.setdefault("metadata", {})
    metadata.update(name=request.name, namespace=request.namespace)
    metadata.setdefault("labels", {}).update(request.labels)
    if request.owner:
        metadata["ownerReferences"] = [request.owner]
    kind.fill(job, request)
    return job


def mount_paths(kind: Kind, job: dict) -> list[str]:
    """Return the training container's mount paths; [] for a TrainJob, whose runtime sets them."""
    replicas = job["spec"].get("pytorchReplicaSpecs")
    if not replicas:
        return []
    container = main_container(next(iter(replicas.values()))["template"]["spec"], kind.container)
    return [mount["mountPath"] for mount in container.get("volumeMounts") or []]


def process_counts(kind: Kind, job: dict) -> range:
    """Return the possible numbers of training processes of this job; empty if unknown.

    A node has `nprocPerNode` (TrainJob: `numProcPerNode`) processes; `gpu` means one per GPU.
    """
    spec = job["spec"]
    if replicas := spec.get("pytorchReplicaSpecs"):
        pod = next(iter(replicas.values()))["template"]["spec"]
        resources = main_container(pod, kind.container).get("resources") or {}
        local, most = spec.get("nprocPerNode"), sum(r["replicas"] for r in replicas.values())
    else:
        trainer = spec["trainer"]
        resources = trainer.get("resourcesPerNode") or {}
        local, most = trainer.get("numProcPerNode"), trainer["numNodes"]
    if local == "gpu":
        local = (resources.get("limits") or {}).get(GPU)
    if not str(local).isdigit():
        return range(0)
    least = (spec.get("elasticPolicy") or {}).get("minReplicas", most)
    return range(least * int(local), most * int(local) + 1, int(local))


def main_container(pod: dict, name: str) -> dict:
    """Return the container with this name. Raises ValueError if it does not exist."""
    for container in pod.get("containers") or []:
        if container.get("name") == name:
            return container
    raise ValueError(
        f"the job's template has no container named {name!r}, which the operator requires"
    )


def fill_pytorchjob(job: dict, request: JobRequest) -> None:
    """Fill in a Master and nodes - 1 Workers, or `nodes` Workers without a Master (elastic)."""
    spec = job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    policy = spec.setdefault("runPolicy", {})
    policy.setdefault("activeDeadlineSeconds", DEFAULT_DEADLINE)
    policy.setdefault("ttlSecondsAfterFinished", DEFAULT_TTL)
    if "backoffLimit" in policy:
        # The operator would add up the restarts of all pods, including those after an eviction; the
        # launcher counts restarts instead (components/launcher/restarts.py).
        annotations = job["metadata"].setdefault("annotations", {})
        annotations[RESTARTS] = str(policy.pop("backoffLimit"))
    elastic = spec.get("elasticPolicy")
    if "Master" not in replicas and not elastic:
        raise ValueError(
            "a PyTorchJob without a Master needs an elasticPolicy: otherwise its pods cannot find "
            "each other"
        )
    if "Master" in replicas:
        # set explicitly, as the operator's webhook validates before it sets defaults
        replicas["Master"]["replicas"] = 1
    workers = request.nodes - ("Master" in replicas)
    if workers and "Worker" not in replicas:
        raise ValueError(
            "the job's template has no Worker, but the requested number of nodes "
            f"({request.nodes}) requires a Worker"
        )
    if workers:
        replicas["Worker"]["replicas"] = workers
    elif "Worker" in replicas:
        del replicas["Worker"]
        spec.pop("elasticPolicy", None)  # the API server rejects this policy without a Worker
    if elastic:
        elastic["maxReplicas"] = request.nodes
        elastic["minReplicas"] = min(elastic.get("minReplicas", 1), request.nodes)
    for replica in replicas.values():
        template = replica["template"]
        template.setdefault("metadata", {}).setdefault("labels", {}).update(request.labels)
        pod = template["spec"]
        container = main_container(pod, "pytorch")
        container |= request.program
        task = reuse_claim_volumes(pod, request.task)
        add_to_container(container, task)
        add_to_pod(pod, replace(request, task=task))


def fill_trainjob(job: dict, request: JobRequest) -> None:
    """Fill in spec.trainer and the pod settings.

    The pod settings are written as podTemplateOverrides for Trainer 2.1 and as runtimePatches,
    which replaced them in Trainer 2.2. The API server drops the field that it does not know.
    """
    spec = job["spec"]
    spec.setdefault("activeDeadlineSeconds", DEFAULT_DEADLINE)  # a TrainJob has no time to live
    trainer = spec.setdefault("trainer", {})
    trainer |= {**request.program, "numNodes": request.nodes}
    task = request.task
    add_to_container(trainer, {"env": task.get("env")})
    if added := task.get("resources"):
        trainer["resourcesPerNode"] = merge_resources(trainer.get("resourcesPerNode"), added)
    pod: dict = {}
    # both are strategic merge patches: the task's tolerations replace the runtime's
    add_to_pod(pod, request)
    if task.get("volume_mounts"):
        pod["containers"] = [{"name": "node", "volumeMounts": task["volume_mounts"]}]
    template: dict = {"metadata": {"labels": request.labels}, **({"spec": pod} if pod else {})}
    nodes = {"name": "node", "template": {"spec": {"template": template}}}
    patch = {
        "manager": "vitdet/launcher",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [nodes]}}},
    }
    others = [p for p in spec.get("runtimePatches") or [] if p["manager"] != patch["manager"]]
    spec["runtimePatches"] = [*others, patch]  # the last patch takes precedence
    override = {"targetJobs": [{"name": "node"}], **template}
    overrides = spec.get("podTemplateOverrides") or []
    others = [p for p in overrides if RUN not in p.get("metadata", {}).get("labels", {})]
    spec["podTemplateOverrides"] = [*others, override]


def add_to_container(container: dict, task: dict) -> None:
    """Merge the task's env, mounts and resources into a container; the task takes precedence."""
    # without KFP_* variables, which refer to the step's pod
    env = [v for v in task.get("env") or [] if not v["name"].startswith("KFP_")]
    for key, added, by in (
        ("env", env, "name"),
        ("volumeMounts", task.get("volume_mounts"), "mountPath"),
    ):
        if added:
            container[key] = merge_by_key(container.get(key), added, by)
    if task.get("resources"):
        container["resources"] = merge_resources(container.get("resources"), task["resources"])


def add_to_pod(pod: dict, request: JobRequest) -> None:
    """Merge scheduling constraints and volumes of the request into a pod's spec."""
    task = request.task
    selector = {**(pod.get("nodeSelector") or {}), **(task.get("node_selector") or {})}
    if request.pool:
        selector[COMPUTE_CLASS if COMPUTE_CLASS in selector else POOL] = request.pool
    if selector:
        pod["nodeSelector"] = selector
    if task.get("affinity"):
        pod["affinity"] = task["affinity"]
    existing = pod.get("tolerations") or []
    if added := [t for t in task.get("tolerations") or [] if t not in existing]:
        pod["tolerations"] = [*existing, *added]
    if task.get("volumes"):
        pod["volumes"] = merge_by_key(pod.get("volumes"), task["volumes"], "name")


def reuse_claim_volumes(pod: dict, task: dict) -> dict:
    """Return the task without the volumes whose claims the pod already uses, with adapted mounts.

    A pod with two volumes for one claim stays in ContainerCreating forever (kubernetes/kubernetes,
    issue 127004). KFP names a volume after its claim; the runtime of a TrainJob uses the same name,
    so the volumes of a TrainJob are merged by name.
    """

    def claim(volume: dict) -> str:
        return (volume.get("persistentVolumeClaim") or {}).get("claimName") or ""

    existing = {claim(v): v["name"] for v in pod.get("volumes") or [] if claim(v)}
    volumes = task.get("volumes") or []
    names = {v["name"]: existing[claim(v)] for v in volumes if claim(v) in existing}
    return {
        **task,
        "volumes": [volume for volume in volumes if volume["name"] not in names],
        "volume_mounts": [
            {**mount, "name": names.get(mount["name"], mount["name"])}
            for mount in task.get("volume_mounts") or []
        ],
    }


def merge_by_key(existing: list[dict] | None, added: list[dict], key: str) -> list[dict]:
    """Concatenate two lists; an added entry replaces an existing entry with the same key."""
    names = {entry[key] for entry in added}
    return [*(entry for entry in existing or [] if entry[key] not in names), *added]


def merge_resources(existing: dict | None, added: dict) -> dict:
    """Merge resources; `added` takes precedence. An added limit replaces an existing request."""
    existing = existing or {}
    limits, requests = ({**existing.get(key, {})} for key in ("limits", "requests"))
    for key in added.get("limits", {}):
        requests.pop(key, None)
    limits |= added.get("limits", {})
    requests |= added.get("requests", {})
    return {key: part for key, part in (("limits", limits), ("requests", requests)) if part}


def pytorchjob_rank0_labels(job: dict) -> dict[str, str]:
    """Return the labels of the Master; without a Master, any Worker may have rank 0."""
    master = "Master" in job["spec"]["pytorchReplicaSpecs"]
    return {"training.kubeflow.org/replica-type": "master" if master else "worker"}


def trainjob_rank0_labels(job: dict) -> dict[str, str]:
    """Return the labels of the first pod of the JobSet's indexed Job `node`."""
    return {
        "batch.kubernetes.io/job-completion-index": "0",
        "jobset.sigs.k8s.io/replicatedjob-name": "node",
    }


KINDS = {
    "pytorchjob": Kind(
        name="PyTorchJob",
        group="kubeflow.org",
        version="v1",
        plural="pytorchjobs",
        operator="the Kubeflow training operator (v1.9)",
        container="pytorch",
        job_label="training.kubeflow.org/job-name",
        fill=fill_pytorchjob,
        rank0=pytorchjob_rank0_labels,
        halt={"runPolicy": {"suspend": True}},
        phases=(
            ("Failed", "failed"),
            ("Succeeded", "succeeded"),
            ("Suspended", "suspended"),
            ("Restarting", "restarting"),
            ("Running", "running"),
            ("Created", "created"),
        ),
    ),
    "trainjob": Kind(
        name="TrainJob",
        group="trainer.kubeflow.org",
        version="v1alpha1",
        plural="trainjobs",
        operator="Kubeflow Trainer (v2.3)",
        container="node",
        job_label="jobset.sigs.k8s.io/jobset-name",
        fill=fill_trainjob,
        rank0=trainjob_rank0_labels,
        halt={"suspend": True},
        phases=(("Failed", "failed"), ("Complete", "succeeded"), ("Suspended", "suspended")),
    ),
}
