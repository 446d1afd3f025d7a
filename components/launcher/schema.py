"""Schema of the job fields that this package reads; invalid YAML is rejected with the path of the field.

The API server validates all other fields. A value of null is an absent field, as in Kubernetes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from msgspec import Meta, Struct, ValidationError, convert, field

GPU = "nvidia.com/gpu"
# YAML reads unquoted numbers; the API server validates the type
Scalar = str | int | float | bool
Map = dict[str, Scalar | None]


class ApiObject(Struct, rename="camel"):
    """Fields of the Kubernetes API; unknown ones are ignored."""


class Metadata(ApiObject):
    """ObjectMeta."""

    name: str | None = None
    labels: Map | None = None
    annotations: Map | None = None


class RuntimeMetadata(Metadata, kw_only=True):
    """ObjectMeta of a runtime, to which a TrainJob refers by name."""

    name: str


class Variable(ApiObject):
    """EnvVar."""

    name: str


class Claim(ApiObject):
    """PersistentVolumeClaimVolumeSource."""

    claim_name: str | None = None


class Volume(ApiObject):
    """Volume."""

    name: str
    persistent_volume_claim: Claim | None = None


class Mount(ApiObject):
    """VolumeMount."""

    name: str
    mount_path: str


class GpuCount:
    """Quantity of a resource that is counted in whole numbers, as 8 or "8"."""


class Limits(ApiObject):
    """The limits that this package reads."""

    gpus: GpuCount | None = field(default=None, name=GPU)


class Resources(ApiObject):
    """ResourceRequirements."""

    limits: Limits | None = None
    requests: Map | None = None


class Container(ApiObject):
    """Container."""

    name: str
    image: str | None = None
    args: list[str] | None = None
    env: list[Variable] | None = None
    volume_mounts: list[Mount] | None = None
    resources: Resources | None = None


class PodFields(ApiObject):
    """What a runtime or a patch may say of a pod."""

    containers: list[Container] | None = None
    volumes: list[Volume] | None = None
    node_selector: Map | None = None
    tolerations: list[dict] | None = None
    affinity: dict | None = None


class Pod(PodFields, kw_only=True):
    """PodSpec with at least one container."""

    containers: Annotated[list[Container], Meta(min_length=1)]


class PodTemplate(ApiObject):
    """PodTemplateSpec."""

    spec: Pod
    metadata: Metadata | None = None


class Replica(ApiObject):
    """ReplicaSpec of the training operator."""

    template: PodTemplate
    replicas: int | None = None


class RunPolicy(ApiObject):
    """RunPolicy of the training operator."""

    active_deadline_seconds: int | None = None
    ttl_seconds_after_finished: int | None = None
    backoff_limit: int | None = None


class ElasticPolicy(ApiObject):
    """ElasticPolicy of the training operator."""

    min_replicas: int | None = None
    max_replicas: int | None = None


class PyTorchJob(ApiObject):
    """PyTorchJobSpec; `validate` checks the replicas."""

    pytorch_replica_specs: Annotated[dict[str, Any], Meta(min_length=1)]
    run_policy: RunPolicy | None = None
    elastic_policy: ElasticPolicy | None = None
    nproc_per_node: Scalar | None = None


class RuntimeRef(ApiObject):
    """RuntimeRef of Kubeflow Trainer."""

    name: str
    kind: str | None = None


class Trainer(ApiObject):
    """Trainer of Kubeflow Trainer."""

    image: str | None = None
    num_nodes: int | None = None
    num_proc_per_node: Scalar | None = None
    env: list[Variable] | None = None
    resources_per_node: Resources | None = None


class OptionalPodTemplate(ApiObject):
    """The pods of a runtime's or a patch's job."""

    spec: PodFields | None = None
    metadata: Metadata | None = None


class JobSpec(ApiObject):
    """batch/v1 JobSpec."""

    template: OptionalPodTemplate | None = None


class JobTemplate(ApiObject):
    """batch/v1 JobTemplateSpec."""

    spec: JobSpec | None = None


class ReplicatedJob(ApiObject):
    """ReplicatedJob of JobSet."""

    name: str
    template: JobTemplate | None = None


class JobSetSpec(ApiObject):
    """JobSetSpec."""

    replicated_jobs: list[ReplicatedJob] | None = None


class JobSetTemplate(ApiObject):
    """The JobSet of a runtime."""

    spec: JobSetSpec | None = None


class RuntimeSpec(ApiObject):
    """TrainingRuntimeSpec, also as a patch."""

    template: JobSetTemplate | None = None


class RuntimePatch(ApiObject):
    """RuntimePatch of Kubeflow Trainer 2.3."""

    manager: str
    training_runtime_spec: RuntimeSpec | None = None


class TrainJob(ApiObject):
    """TrainJobSpec."""

    runtime_ref: RuntimeRef
    trainer: Trainer | None = None
    runtime_patches: list[RuntimePatch] | None = None
    active_deadline_seconds: int | None = None


# kind -> types of metadata and spec
TYPES: dict[str, tuple[Any, Any]] = {
    "PyTorchJob": (Metadata | None, PyTorchJob),
    "TrainJob": (Metadata | None, TrainJob),
    "TrainingRuntime": (RuntimeMetadata, RuntimeSpec),
    "ClusterTrainingRuntime": (RuntimeMetadata, RuntimeSpec),
}


def validate(document: dict) -> dict:
    """Return a copy of a job or runtime without nulls; documents of other kinds are returned as they are.

    Raises ValueError with the path of a field that is missing or of another type.
    """
    kind = str(document.get("kind"))
    if kind not in TYPES:
        return document
    metadata, spec = TYPES[kind]
    _check(document.get("metadata"), metadata, f"{kind}: metadata")
    if not isinstance(document.get("spec"), dict):
        raise ValueError(f"the job's file: its {kind} has no spec")
    _check(document["spec"], spec, f"{kind}: spec")
    # One by one, because msgspec does not report the keys of a mapping: `pytorchReplicaSpecs[...]`
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
        convert(value, kind, dec_hook=_gpu_count)
    except ValidationError as error:
        message, _, path = str(error).partition(" - at ")
        inside = path.removeprefix("`key` in ").strip("`").removeprefix("$")
        if path.startswith("`key` in "):
            key = next(key for key in _mapping_at(value, inside) if not isinstance(key, str))
            message = f"expected only strings as keys, got {key!r}"
        elif inside.endswith("[...]"):
            inside = inside.removesuffix("[...]")
            entries = _mapping_at(value, inside).items()
            name = next(key for key, one in entries if not isinstance(one, Scalar | None))
            inside = f"{inside}.{name}"
        message = re.sub(r"^Object missing required field", "missing", message)
        message = message[0].lower() + message[1:]
        raise ValueError(
            f"the job's file: its {place}{inside}: {message.replace('`', '')}"
        ) from None


def _mapping_at(value: Any, path: str) -> dict:
    """Return the mapping at a path as `.template.spec.containers[0].resources`."""
    for name, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
        value = value[name or int(index)]
    return value


def _gpu_count(kind: type, value: object) -> object:
    """Convert to GpuCount, the only type that msgspec does not know."""
    if not re.fullmatch("[0-9]+", str(value)):
        raise ValueError(f"expected a whole number, got {value!r}")
    return kind()
