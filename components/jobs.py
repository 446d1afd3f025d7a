"""The two kinds of training job as plain dictionaries: how a template is filled in, how a job's state is read.

PyTorchJob (kubeflow.org/v1, training operator 1.9) and its successor TrainJob (trainer.kubeflow.org/v1alpha1, Kubeflow
Trainer 2.3). All that the rest has to know of a kind is one record of KINDS; following a job is the same for both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import yaml

POOL = "vitdet/pool"  # the label that our node pools set, so that a job does not know its cloud
COMPUTE_CLASS = "cloud.google.com/compute-class"  # the same on GKE, where a pool's nodes can have no label with a slash
RUN, RECIPE = "vitdet/run", "vitdet/recipe"
DEADLINE, KEEP = (
    14 * 24 * 3600,
    7 * 24 * 3600,
)  # seconds, where the template says nothing: active at most, kept after


@dataclass(frozen=True)
class Wish:
    """What a run wants of a job: everything that differs from the template.

    task: the settings of the pipeline's task, as the fields of kfp's dsl.TaskConfig: affinity, tolerations,
    node_selector, env, volumes, volume_mounts, resources; each None or in the Kubernetes API's own form.
    owner: an ownerReference; the job is deleted together with it.
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


@dataclass(frozen=True)
class Kind:
    """A kind of job: its address in the API, how its pods are found, how it is filled in and read.

    phases: (condition type, what it means) in the order in which they outrank each other.
    rank0: labels of the pods one of which writes the log of rank 0, by what the job says.
    halt: what its spec has to say for the operator to take its pods away and keep the job.
    """

    name: str
    group: str
    version: str
    plural: str
    operator: str
    container: str
    job_label: str
    phases: tuple[tuple[str, str], ...]
    fill: Callable[[dict, Wish], None]
    rank0: Callable[[dict], dict[str, str]]
    halt: dict

    def selector(self, name: str) -> str:
        """Selects the pods of a job."""
        return f"{self.job_label}={name}"


def job_name(run_id: str, recipe: str) -> str:
    """The same for the same run and recipe, else another: a DNS-1035 label of at most 40 characters.

    The pods' names are longer by a suffix and have to be labels themselves, of at most 63.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", recipe.lower()).strip("-")[:22].strip("-")
    mark = hashlib.sha256(f"{run_id}/{recipe}".encode()).hexdigest()[:10]
    return "-".join(part for part in ("vitdet", slug, mark) if part)


def label(text: str) -> str:
    """The text as a label's value: other characters become `-`, at most 63 stay."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:63].strip("-._")


def fill(template: str, kind: Kind, wish: Wish) -> dict:
    """The job of a YAML template, filled in.

    Raises ValueError when the template is not one job of this kind, or cannot hold what is wished.
    """
    if wish.nodes < 1:
        raise ValueError(f"a job needs at least 1 node, got {wish.nodes}")
    found = [part for part in yaml.safe_load_all(template) if part]
    jobs = [part for part in found if part.get("kind") == kind.name]
    if len(jobs) != 1:
        raise ValueError(
            f"the job's template must hold one {kind.name}, it holds "
            f"{', '.join(str(part.get('kind')) for part in found) or 'nothing'}"
        )
    job = json.loads(
        json.dumps(jobs[0])
    )  # YAML anchors share one object: Master and Worker must not
    metadata = job.setdefault("metadata", {})
    metadata.update(name=wish.name, namespace=wish.namespace)
    metadata.setdefault("labels", {}).update(wish.labels)
    if wish.owner:
        metadata["ownerReferences"] = [wish.owner]
    kind.fill(job, wish)
    return job


def state(kind: Kind, job: dict) -> tuple[str, str]:
    """(phase, message): the phase that the conditions with status True mean, "" when there is none.

    Any condition counts, whatever its place: controllers keep the old ones and do not sort them.
    """
    status = job.get("status") or {}
    true = {
        one["type"]: one for one in status.get("conditions") or [] if one.get("status") == "True"
    }
    for condition, phase in kind.phases:
        if condition in true:
            return phase, true[condition].get("message") or true[condition].get("reason") or ""
    if any(one.get("ready") for one in status.get("jobsStatus") or []):
        return "running", ""
    return (
        ("created", "") if status.get("jobsStatus") or status.get("replicaStatuses") else ("", "")
    )


def overrun(job: dict, message: str) -> str:
    """What a failed job's deadline was, when that is what failed it; else "".

    The message tells: of the training operator it is "... active longer than specified deadline" (common/job.go,
    ReconcileJobs, whose reason is that of every failure), of Trainer "... exceeded its active deadline".
    """
    if "deadline" not in message:
        return ""
    spec = job["spec"]
    return f"activeDeadlineSeconds, {(spec.get('runPolicy') or spec).get('activeDeadlineSeconds')} s in the job's file"


def mounts(kind: Kind, job: dict) -> list[str]:
    """The folders that the training container mounts; empty where another object of the cluster says so."""
    replicas = job["spec"].get("pytorchReplicaSpecs")
    if not replicas:
        return []
    container = main_container(next(iter(replicas.values()))["template"]["spec"], kind.container)
    return [one["mountPath"] for one in container.get("volumeMounts") or []]


def main_container(pod: dict, name: str) -> dict:
    """The container of this name.

    Raises ValueError when the pod has none: the operators find the training container by its name.
    """
    for container in pod.get("containers") or []:
        if container.get("name") == name:
            return container
    raise ValueError(
        f"the job's template has no container named {name!r}, which is the one that the operator starts"
    )


def fill_pytorchjob(job: dict, wish: Wish) -> None:
    """A Master and nodes - 1 Workers, or `nodes` Workers where the template has no Master (elastic)."""
    spec = job["spec"]
    replicas = spec["pytorchReplicaSpecs"]
    policy = spec.setdefault("runPolicy", {})
    policy.setdefault("activeDeadlineSeconds", DEADLINE)
    policy.setdefault("ttlSecondsAfterFinished", KEEP)
    if (
        "backoffLimit" in policy
    ):  # the operator adds up the restarts of all pods, and they start again together
        policy["backoffLimit"] *= wish.nodes
    elastic = spec.get("elasticPolicy")
    if "Master" not in replicas and not elastic:
        raise ValueError(
            "a PyTorchJob without a Master needs an elasticPolicy: its pods would not find each other"
        )
    if "Master" in replicas:
        replicas["Master"]["replicas"] = (
            1  # written out: the operator's webhook looks before defaults are set
        )
    workers = wish.nodes - ("Master" in replicas)
    if workers and "Worker" not in replicas:
        raise ValueError(f"{wish.nodes} nodes are wished, but the job's template has no Worker")
    if workers:
        replicas["Worker"]["replicas"] = workers
    elif "Worker" in replicas:
        del replicas["Worker"]
        spec.pop("elasticPolicy", None)  # it is refused without a Worker
    if elastic:
        elastic["maxReplicas"] = wish.nodes
        elastic["minReplicas"] = min(elastic.get("minReplicas", 1), wish.nodes)
    for replica in replicas.values():
        template = replica["template"]
        template.setdefault("metadata", {}).setdefault("labels", {}).update(wish.labels)
        pod = template["spec"]
        container = main_container(pod, "pytorch")
        container.update(args=wish.args, **({"image": wish.image} if wish.image else {}))
        task = once_mounted(pod, wish.task)
        add_to_container(container, task)
        add_to_pod(pod, replace(wish, task=task))


def fill_trainjob(job: dict, wish: Wish) -> None:
    """spec.trainer, and what belongs to the pods as a patch of the runtime (`runtimePatches`, Trainer 2.3)."""
    spec = job["spec"]
    spec.setdefault("activeDeadlineSeconds", DEADLINE)  # a TrainJob has no time to live
    trainer = spec.setdefault("trainer", {})
    trainer.update(
        args=wish.args, numNodes=wish.nodes, **({"image": wish.image} if wish.image else {})
    )
    task = wish.task
    add_to_container(trainer, {"env": task.get("env")})
    if task.get("resources"):
        trainer["resourcesPerNode"] = merged_resources(
            trainer.get("resourcesPerNode"), task["resources"]
        )
    pod: dict = {}
    add_to_pod(
        pod, wish
    )  # the controller merges as kubectl patch does: by name and key, but tolerations as a whole
    if task.get("volume_mounts"):
        pod["containers"] = [{"name": "node", "volumeMounts": task["volume_mounts"]}]
    template: dict = {"metadata": {"labels": wish.labels}, **({"spec": pod} if pod else {})}
    nodes = {"name": "node", "template": {"spec": {"template": template}}}
    patch = {
        "manager": "vitdet/launcher",
        "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [nodes]}}},
    }
    others = [one for one in spec.get("runtimePatches") or [] if one["manager"] != patch["manager"]]
    spec["runtimePatches"] = [*others, patch]  # the later one wins


def add_to_container(container: dict, task: dict) -> None:
    """Env and mounts of the task over those of the template, its resources over the template's."""
    own = [
        one for one in task.get("env") or [] if not one["name"].startswith("KFP_")
    ]  # those name the step's own pod
    for key, added, by in (
        ("env", own, "name"),
        ("volumeMounts", task.get("volume_mounts"), "mountPath"),
    ):
        if added:
            container[key] = over(container.get(key), added, by)
    if task.get("resources"):
        container["resources"] = merged_resources(container.get("resources"), task["resources"])


def add_to_pod(pod: dict, wish: Wish) -> None:
    """Where the pod may run, and its volumes."""
    task = wish.task
    selector = {**(pod.get("nodeSelector") or {}), **(task.get("node_selector") or {})}
    if wish.pool:
        selector[COMPUTE_CLASS if COMPUTE_CLASS in selector else POOL] = wish.pool
    if selector:
        pod["nodeSelector"] = selector
    if task.get("affinity"):
        pod["affinity"] = task["affinity"]
    if task.get("tolerations"):
        there = pod.get("tolerations") or []
        pod["tolerations"] = [*there, *(one for one in task["tolerations"] if one not in there)]
    if task.get("volumes"):
        pod["volumes"] = over(pod.get("volumes"), task["volumes"], "name")


def once_mounted(pod: dict, task: dict) -> dict:
    """The task with the pod's own volume wherever it has another one of the same claim.

    A pod with two volumes of one claim stays in ContainerCreating for ever (kubernetes/kubernetes, issue 127004). KFP
    gives a volume the name of its claim; under that name the runtime of a TrainJob has it too, and they are merged.
    """

    def claim(volume: dict) -> str:
        return (volume.get("persistentVolumeClaim") or {}).get("claimName") or ""

    there = {claim(one): one["name"] for one in pod.get("volumes") or [] if claim(one)}
    volumes = task.get("volumes") or []
    names = {one["name"]: there[claim(one)] for one in volumes if claim(one) in there}
    return {
        **task,
        "volumes": [one for one in volumes if one["name"] not in names],
        "volume_mounts": [
            {**one, "name": names.get(one["name"], one["name"])}
            for one in task.get("volume_mounts") or []
        ],
    }


def over(there: list[dict] | None, added: list[dict], key: str) -> list[dict]:
    """Both lists; of two with the same key the added one."""
    names = {one[key] for one in added}
    return [*(one for one in there or [] if one[key] not in names), *added]


def merged_resources(there: dict | None, added: dict) -> dict:
    """Limits and requests, the added ones first; an added limit without a request takes the old request's place."""
    there = there or {}
    limits = {**there.get("limits", {}), **added.get("limits", {})}
    old = {
        key: value
        for key, value in there.get("requests", {}).items()
        if key not in added.get("limits", {})
    }
    requests = {**old, **added.get("requests", {})}
    return {
        **({"limits": limits} if limits else {}),
        **({"requests": requests} if requests else {}),
    }


def pytorch_rank0(job: dict) -> dict[str, str]:
    """The Master; without one any Worker may have got rank 0."""
    master = "Master" in job["spec"]["pytorchReplicaSpecs"]
    return {"training.kubeflow.org/replica-type": "master" if master else "worker"}


def train_rank0(job: dict) -> dict[str, str]:
    """The first pod of the indexed Job `node` of the JobSet."""
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
        rank0=pytorch_rank0,
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
        rank0=train_rank0,
        halt={"suspend": True},
        phases=(("Failed", "failed"), ("Complete", "succeeded"), ("Suspended", "suspended")),
    ),
}
