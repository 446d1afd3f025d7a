"""The fields of a training job that this package reads, as types: YAML with holes is refused by path.

Other fields are the API server's to check. A value of null is an absent field, as for Kubernetes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert

Text = str | int | float | bool  # YAML reads unquoted numbers; the API server has the last word


class Typed(Struct, rename="camel"):
    """Fields of the Kubernetes API; unknown ones are ignored."""


class Metadata(Typed):
    """ObjectMeta."""

    name: str | None = None
    labels: dict[str, Text] | None = None
    annotations: dict[str, Text] | None = None


class Variable(Typed):
    """EnvVar."""

    name: str


class Claim(Typed):
    """PersistentVolumeClaimVolumeSource."""

    claim_name: str | None = None


class Volume(Typed):
    """Volume."""

    name: str
    persistent_volume_claim: Claim | None = None


class Mount(Typed):
    """VolumeMount."""

    name: str
    mount_path: str


class Resources(Typed):
    """ResourceRequirements."""

    limits: dict[str, Text] | None = None
    requests: dict[str, Text] | None = None


class Container(Typed):
    """Container."""

    name: str
    image: str | None = None
    args: list[str] | None = None
    env: list[Variable] | None = None
    volume_mounts: list[Mount] | None = None
    resources: Resources | None = None


class PodFields(Typed):
    """What a runtime or a patch may say of a pod."""

    containers: list[Container] | None = None
    volumes: list[Volume] | None = None
    node_selector: dict[str, Text] | None = None
    tolerations: list[dict] | None = None
    affinity: dict | None = None


class Pod(PodFields, kw_only=True):
    """PodSpec with at least one container."""

    containers: Annotated[list[Container], Meta(min_length=1)]


class PodTemplate(Typed):
    """PodTemplateSpec."""

    spec: Pod
    metadata: Metadata | None = None


class Replica(Typed):
    """ReplicaSpec of the training operator."""

    template: PodTemplate
    replicas: int | None = None


class RunPolicy(Typed):
    """RunPolicy of the training operator."""

    active_deadline_seconds: int | None = None
    ttl_seconds_after_finished: int | None = None
    backoff_limit: int | None = None


class ElasticPolicy(Typed):
    """ElasticPolicy of the training operator."""

    min_replicas: int | None = None
    max_replicas: int | None = None


class PyTorchJob(Typed):
    """PyTorchJobSpec without its replicas, which are checked one by one."""

    pytorch_replica_specs: Annotated[dict[str, Any], Meta(min_length=1)]
    run_policy: RunPolicy | None = None
    elastic_policy: ElasticPolicy | None = None
    nproc_per_node: Text | None = None


class RuntimeRef(Typed):
    """RuntimeRef of Kubeflow Trainer."""

    name: str
    kind: str | None = None


class Trainer(Typed):
    """Trainer of Kubeflow Trainer."""

    image: str | None = None
    num_nodes: int | None = None
    num_proc_per_node: Text | None = None
    env: list[Variable] | None = None
    resources_per_node: Resources | None = None


class OptionalPodTemplate(Typed):
    """The pods of a runtime's or a patch's job."""

    spec: PodFields | None = None
    metadata: Metadata | None = None


class JobSpec(Typed):
    """batch/v1 JobSpec."""

    template: OptionalPodTemplate | None = None


class JobTemplate(Typed):
    """batch/v1 JobTemplateSpec."""

    spec: JobSpec | None = None


class ReplicatedJob(Typed):
    """ReplicatedJob of JobSet."""

    name: str
    template: JobTemplate | None = None


class JobSetSpec(Typed):
    """JobSetSpec."""

    replicated_jobs: list[ReplicatedJob] | None = None


class JobSetTemplate(Typed):
    """The JobSet of a runtime."""

    spec: JobSetSpec | None = None


class RuntimeSpec(Typed):
    """TrainingRuntimeSpec, also as a patch."""

    template: JobSetTemplate | None = None


class RuntimePatch(Typed):
    """RuntimePatch of Kubeflow Trainer 2.3."""

    manager: str
    training_runtime_spec: RuntimeSpec | None = None


class TrainJob(Typed):
    """TrainJobSpec."""

    runtime_ref: RuntimeRef
    trainer: Trainer | None = None
    runtime_patches: list[RuntimePatch] | None = None
    active_deadline_seconds: int | None = None


SPECS: dict[str, type] = {
    "PyTorchJob": PyTorchJob,
    "TrainJob": TrainJob,
    "TrainingRuntime": RuntimeSpec,
    "ClusterTrainingRuntime": RuntimeSpec,
}


def checked(document: dict) -> dict:
    """Return a copy of a job or runtime without nulls; documents of other kinds are returned as they are.

    Raises ValueError with the path of a field that is missing or of another type.
    """
    kind = str(document.get("kind"))
    if kind not in SPECS:
        return document
    _check(document.get("metadata"), Metadata | None, f"{kind}: metadata")
    if not isinstance(document.get("spec"), dict):
        raise ValueError(f"the job's file: its {kind} has no spec")
    _check(document["spec"], SPECS[kind], f"{kind}: spec")
    for name, replica in document["spec"].get("pytorchReplicaSpecs", {}).items():
        _check(replica, Replica, f"{kind}: spec.pytorchReplicaSpecs.{name}")
    return without_nulls(document)


def without_nulls(value: Any) -> Any:
    """Return a copy in which no mapping has a value of null."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    if isinstance(value, list):
        return [without_nulls(one) for one in value]
    return value


def _check(value: object, kind: Any, place: str) -> None:
    try:
        convert(value, kind)
    except ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        inside = path.strip("`").removeprefix("$")
        message = re.sub(r"^Object missing required field", "missing", message)
        message = message[0].lower() + message[1:]
        raise ValueError(
            f"the job's file: its {place}{inside}: {message.replace('`', '')}"
        ) from None
