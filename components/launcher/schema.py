"""Schema of the job fields that this package reads; errors contain the path of the field.

The API server validates all other fields. A field with the value null is treated as absent, as in
Kubernetes.
"""

from __future__ import annotations

import re
from typing import Annotated, Any

from msgspec import Meta, ValidationError, convert, defstruct

GPU = "nvidia.com/gpu"


class _GpuCount:
    """A number of GPUs: a whole number such as 8 or "8"."""


def _fields(name: str, required: dict[str, Any] | None = None, /, **optional: Any) -> Any:
    """Return a type with these fields of the Kubernetes API; other fields are ignored."""
    fields: list[Any] = list((required or {}).items())
    return defstruct(name, fields + [(key, kind | None, None) for key, kind in optional.items()])


def _list(kind: Any) -> Any:
    return list[kind]


# YAML parses an unquoted 8 as a number, not a string; the API server validates the type
Scalar = str | int | float | bool
_MAP = dict[str, Scalar | None]
_METADATA = _fields("Metadata", name=str, labels=_MAP, annotations=_MAP)
# with a required name, as a TrainJob refers to its runtime by name
_NAMED = _fields("RuntimeMetadata", {"name": str}, labels=_MAP, annotations=_MAP)
_ENV = _list(_fields("EnvVar", {"name": str}))
_LIMITS = defstruct("Limits", [("gpus", _GpuCount | None, None)], rename={"gpus": GPU})
_RESOURCES = _fields("Resources", limits=_LIMITS, requests=_MAP)
_CONTAINER = _fields(
    "Container",
    {"name": str},
    image=str,
    args=list[str],
    env=_ENV,
    volumeMounts=_list(_fields("VolumeMount", {"name": str, "mountPath": str})),
    resources=_RESOURCES,
)
_POD_FIELDS = {
    "volumes": _list(
        _fields(
            "Volume", {"name": str}, persistentVolumeClaim=_fields("VolumeClaim", claimName=str)
        )
    ),
    "nodeSelector": _MAP,
    "tolerations": list[dict],
    "affinity": dict,
}
_POD = _fields(
    "PodSpec", {"containers": Annotated[_list(_CONTAINER), Meta(min_length=1)]}, **_POD_FIELDS
)
# one entry of a PyTorchJob's pytorchReplicaSpecs
_REPLICA = _fields(
    "ReplicaSpec",
    {"template": _fields("PodTemplate", {"spec": _POD}, metadata=_METADATA)},
    replicas=int,
)
_PYTORCHJOB = _fields(
    "PyTorchJobSpec",
    {"pytorchReplicaSpecs": Annotated[dict[str, Any], Meta(min_length=1)]},
    runPolicy=_fields(
        "RunPolicy", activeDeadlineSeconds=int, ttlSecondsAfterFinished=int, backoffLimit=int
    ),
    elasticPolicy=_fields("ElasticPolicy", minReplicas=int, maxReplicas=int),
    nprocPerNode=Scalar,
)
# the pods of a TrainJob, in its runtime, runtimePatches and podTemplateOverrides
_POD_PATCH = _fields("JobPodSpec", containers=_list(_CONTAINER), **_POD_FIELDS)
_PODS = _fields("JobPodTemplate", spec=_POD_PATCH, metadata=_METADATA)
_JOB = _fields("JobTemplate", spec=_fields("JobSpec", template=_PODS))
_JOBSET = _fields(
    "JobSetSpec", replicatedJobs=_list(_fields("ReplicatedJob", {"name": str}, template=_JOB))
)
_TARGETS = _list(_fields("TargetJob", {"name": str}))
_RUNTIME = _fields("RuntimeSpec", template=_fields("JobSetTemplate", spec=_JOBSET))
_TRAINJOB = _fields(
    "TrainJobSpec",
    {"runtimeRef": _fields("RuntimeRef", {"name": str}, kind=str)},
    trainer=_fields(
        "Trainer",
        image=str,
        numNodes=int,
        numProcPerNode=Scalar,
        env=_ENV,
        resourcesPerNode=_RESOURCES,
    ),
    runtimePatches=_list(_fields("RuntimePatch", {"manager": str}, trainingRuntimeSpec=_RUNTIME)),
    podTemplateOverrides=_list(
        _fields("PodTemplateOverride", metadata=_METADATA, spec=_POD_PATCH, targetJobs=_TARGETS)
    ),
    activeDeadlineSeconds=int,
)
# kind -> types of metadata and spec
TYPES: dict[str, tuple[Any, Any]] = {
    "PyTorchJob": (_METADATA | None, _PYTORCHJOB),
    "TrainJob": (_METADATA | None, _TRAINJOB),
    "TrainingRuntime": (_NAMED, _RUNTIME),
    "ClusterTrainingRuntime": (_NAMED, _RUNTIME),
}


def validate(document: dict) -> dict:
    """Return a copy of a job or runtime without nulls; other documents are returned unchanged.

    Raises ValueError with the path of a field that is missing or has the wrong type.
    """
    kind = str(document.get("kind"))
    if kind not in TYPES:
        return document
    metadata, spec = TYPES[kind]
    _check(document.get("metadata"), metadata, f"{kind}: metadata")
    if not isinstance(document.get("spec"), dict):
        raise ValueError(f"job manifest: the {kind} has no spec")
    _check(document["spec"], spec, f"{kind}: spec")
    # check each replica separately, as msgspec's errors do not contain the keys of mappings
    for name, replica in document["spec"].get("pytorchReplicaSpecs", {}).items():
        _check(replica, _REPLICA, f"{kind}: spec.pytorchReplicaSpecs.{name}")
    return without_nulls(document)


def without_nulls(value: Any) -> Any:
    """Return a copy without the mapping entries whose value is null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [without_nulls(entry) for entry in value]
    return value


def _check(value: object, kind: Any, name: str) -> None:
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
            wrong = next(key for key, item in entries if not isinstance(item, Scalar | None))
            inside = f"{inside}.{wrong}"
        message = re.sub(r"^Object missing required field", "missing", message)
        message = message[0].lower() + message[1:]
        raise ValueError(f"job manifest: {name}{inside}: {message.replace('`', '')}") from None


def _mapping_at(value: Any, path: str) -> dict:
    """Return the mapping at a path such as `.template.spec.containers[0].resources`."""
    for name, index in re.findall(r"\.([^.\[]+)|\[(\d+)\]", path):
        value = value[name or int(index)]
    return value


def _gpu_count(kind: type, value: object) -> object:
    """Validate a number of GPUs; msgspec calls this for the type _GpuCount."""
    if not re.fullmatch("[0-9]+", str(value)):
        raise ValueError(f"expected a whole number, got {value!r}")
    return kind()
