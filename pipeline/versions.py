"""Versions of Kubeflow Pipelines: the fields of a compiled pipeline that each server supports.

Servers refuse a pipeline with an unknown field: HTTP 400 for the pipeline itself, 500 for the
Kubernetes part (kubeflow/pipelines at the tags of SERVERS: backend/src/apiserver/template/
v2_template.go, backend/src/v2/compiler/argocompiler/container.go). `fit` removes the fields that a
server does not support.

Pipelines 2.5 (Kubeflow 1.10) refuses the pipeline because of the exit handler's input
taskFinalStatus (argocompiler/dag.go: addImplicitDependencies), and has no dsl.Collected.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

Version = tuple[int, int, int]

# release -> the Kubeflow distribution that contains it, or ""
SERVERS: dict[Version, str] = {
    (2, 14, 0): "",
    (2, 15, 0): "Kubeflow 1.11",
    (2, 16, 0): "Kubeflow 26.03",
    (2, 16, 1): "Kubeflow 26.03.1",
    (2, 17, 0): "",
}
OLDEST, NEWEST = min(SERVERS), max(SERVERS)


@dataclass(frozen=True)
class Field:
    """A field of a compiled pipeline that a release of Kubeflow Pipelines added.

    Attributes:
        path: Keys from the top of a document; "*" matches any key or list item.
        since: The first release that supports the field.
        loss: What the user loses without the field; empty if the field cannot be left out.
        value: If set, the (key, value) that the field must contain.
    """

    path: str
    since: Version
    loss: str = ""
    value: tuple[str, str] = ("", "")

    @property
    def name(self) -> str:
        """Return the field or value that a server's error reports as unknown."""
        return self.value[1] or self.path.rpartition(".")[2]


_EXECUTOR = "platforms.kubernetes.deploymentSpec.executors.*."
_RUN = "platforms.kubernetes.pipelineConfig."
_KEPT = "the server decides how long the finished Workflow is kept"
_JOB = (
    "the training job uses only the environment, volumes, node selector and tolerations of its "
    "manifest"
)

# The fields that were added after OLDEST: api/v2alpha1/pipeline_spec.proto and
# kubernetes_platform/proto/kubernetes_executor_config.proto, compared at the tags of SERVERS.
FIELDS = (
    Field("components.*.taskConfigPassthroughs", (2, 15, 0), _JOB),
    Field(
        "components.*.inputDefinitions.parameters.*",
        (2, 15, 0),
        _JOB,
        ("parameterType", "TASK_CONFIG"),
    ),
    Field("deploymentSpec.executors.*.importer.downloadToWorkspace", (2, 15, 0)),
    *(
        Field(
            f"{_EXECUTOR}{field}.*.optional",
            (2, 15, 0),
            f"a pod does not start until its {kind} exists and has all keys",
        )
        for field, kind in (("secretAsEnv", "Secret"), ("configMapAsEnv", "ConfigMap"))
    ),
    Field(
        f"{_EXECUTOR}securityContext",
        (2, 16, 0),
        "the steps run as their image's user, and a namespace with Pod Security `restricted` does "
        "not admit them",
    ),
    Field(f"{_EXECUTOR}pvcMount.*.subPath", (2, 16, 0)),
    *(
        Field(
            f"{group}.inputDefinitions.parameters.*.literals",
            (2, 16, 0),
            "a parameter's value is checked by the step and not when the run is started",
        )
        for group in ("root", "components.*")
    ),
    *(
        Field(f"{_RUN}resourceTtlOn{event}", (2, 17, 0), _KEPT)
        for event in ("Completion", "Success", "Failure")
    ),
    Field(f"{_RUN}activeDeadlineSeconds", (2, 17, 0), "runs have no time limit"),
)


def text(version: Version) -> str:
    """Return a version as text."""
    return ".".join(map(str, version))


def read_version(given: str) -> Version:
    """Return the version in a string such as 2.15, 2.15.0 or v2.15.0-rc.1.

    A patch release supports the fields of its minor release. Raises ValueError for any other
    string and for an unsupported release.
    """
    match = re.fullmatch(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:[-+.][\w.+-]+)?", given.strip())
    supported = ", ".join(
        f"{text(version)} ({kubeflow})" if kubeflow else text(version)
        for version, kubeflow in SERVERS.items()
    )
    if not match:
        raise ValueError(f"version {given!r} of Kubeflow Pipelines: expected one of {supported}")
    version = (int(match[1]), int(match[2]), int(match[3] or 0))
    if version[:2] not in {known[:2] for known in SERVERS}:
        age = "too old" if version < OLDEST else "newer than this client supports"
        raise ValueError(f"Kubeflow Pipelines {given} is {age}; supported: {supported}")
    return version


def server_version(health: dict) -> tuple[Version, str]:
    """Return the version that a server reports at /healthz, and a remark for the user or "".

    The API server reports the version as tag_name, the web interface as apiServerTagName. Images
    before 2.16 were built without a version and report "unknown"
    (.github/workflows/build-and-push.yml at the tags); images since 2.14 report pipeline_store.
    Raises ValueError for an unsupported version that is not newer than NEWEST.
    """
    given = str(health.get("tag_name") or health.get("apiServerTagName") or "unknown")
    if match := re.match(r"v?(\d+)\.(\d+)", given):
        if (int(match[1]), int(match[2])) <= NEWEST[:2]:
            return read_version(given), ""
        treated = f"treated as {text(NEWEST)}, the newest known version"
        return NEWEST, f"the server runs Pipelines {given}; {treated}"
    if not (health.get("pipeline_store") or health.get("pipelineStore")):
        raise ValueError(
            f"the server does not report its version, and is older than {text(OLDEST)}, the oldest "
            "supported version; pass --kfp VERSION if this is wrong"
        )
    version = (2, 15, 0)
    return version, (
        f"the server does not report its version; treated as Pipelines {text(version)} "
        f"({SERVERS[version]}); pass --kfp VERSION if this is wrong"
    )


def fit(documents: list[dict], version: Version) -> list[str]:
    """Remove, in place, the fields of a pipeline that this server version does not support.

    Returns one line for each entry of FIELDS that was removed, stating what the user loses. Raises
    ValueError for an unsupported field that cannot be left out.
    """
    lines = []
    for field in FIELDS:
        if version >= field.since:
            continue
        found = [item for document in documents for item in occurrences(document, field)]
        if not found:
            continue
        if not field.loss:
            raise ValueError(
                f"the pipeline uses {field.name}, which Pipelines {text(version)} does not support "
                f"and which cannot be left out; it needs {text(field.since)} or later"
            )
        for parent, key in found:
            del parent[key]
        lines.append(
            f"Pipelines {text(version)} does not support {field.name} ({text(field.since)} does); "
            f"left out (occurrences: {len(found)}): {field.loss}"
        )
    return lines


def occurrences(document: dict, field: Field) -> list[tuple[dict, str]]:
    """Return the (parent, key) of each occurrence of a field."""

    def walk(node: object, keys: list[str]) -> Iterator[tuple[dict, str]]:
        key, *rest = keys
        if isinstance(node, list) and key == "*":
            for item in node:
                yield from walk(item, rest)
        if not isinstance(node, dict):
            return
        for name in list(node) if key == "*" else [key] if key in node else []:
            if rest:
                yield from walk(node[name], rest)
            else:
                yield node, name

    wanted, value = field.value
    return [
        (parent, key)
        for parent, key in walk(document, field.path.split("."))
        if not wanted or (isinstance(parent[key], dict) and parent[key].get(wanted) == value)
    ]


def refused_field(message: str) -> str:
    """Return the field or value that a server's error reports as unknown; "" for other errors.

    Go's protojson reports `unknown field "X"` or `invalid value for enum field F: "X"`.
    """
    match = re.search(r'unknown field "([^"]+)"|invalid value for enum [^"]*"([^"]+)"', message)
    return (match[1] or match[2]) if match else ""
