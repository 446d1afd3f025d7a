"""Invalid jobs: a field that is null, missing or of the wrong type is ignored, or rejected with its path."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from components.launcher.schema import validate
from components.launcher.templates import KINDS, fill_template, mount_paths, process_counts
from pipeline.job_manifests import accelerators, job_image, training_jobs
from tests.cluster.test_launcher import TEMPLATES, request
from tests.conftest import ROOT

VALUES: tuple[Any, ...] = (None, "text", [None])
# Errors about what the fields mean together, not about the type of one field
MEANING = (
    "the YAML contains no PyTorchJob or TrainJob",
    "the job's template must contain exactly one ",
    "the job's template has no container named 'pytorch'",
    "expected one image for all training jobs",
    "no Worker, but the requested number of nodes (2) requires a Worker",
    "a PyTorchJob without a Master needs an elasticPolicy",
    "is not among the documents",
)


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every field and entry of a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, child in items:
        if "Worker" in path:
            continue  # the Worker has the same fields as the Master
        yield (*path, key)
        if isinstance(child, dict | list):
            yield from places(child, (*path, key))


def changed(document: dict, path: tuple, value: object) -> dict:
    made = copy.deepcopy(document)
    node = made
    for key in path[:-1]:
        node = node[key]
    if value is KeyError:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return made


def read_all(text: str, kind: str) -> None:
    """Read every field of a job that compilation and the launcher use."""
    jobs = training_jobs(text)
    job_image(jobs)
    accelerators(text)
    job = fill_template(text, KINDS[kind], request(nodes=2))
    mount_paths(KINDS[kind], job)
    process_counts(KINDS[kind], job)


def text_of(path: tuple) -> str:
    """Return a path as text, e.g. `spec.containers[0].name`."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)[1:]


def trainjob() -> tuple[dict, dict]:
    """Return (TrainJob with a patch, its runtime) of manifests/."""
    folder = ROOT / "manifests" / "trainjob"
    job, runtime = (
        yaml.safe_load((folder / name).read_text()) for name in ("trainjob.yaml", "runtime.yaml")
    )
    pod = {
        "nodeSelector": {"zone": "a"},
        "tolerations": [{"key": "x"}],
        "containers": [{"name": "node", "volumeMounts": [{"name": "data", "mountPath": "/data"}]}],
    }
    node = {"name": "node", "template": {"spec": {"template": {"spec": pod}}}}
    job["spec"]["runtimePatches"] = [
        {"manager": "m", "trainingRuntimeSpec": {"template": {"spec": {"replicatedJobs": [node]}}}}
    ]
    job["spec"].setdefault("trainer", {})["image"] = "image:1"
    return job, runtime


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "number"), [("pytorchjob", 0), ("trainjob", 0), ("trainjob", 1)])
def test_a_rejected_field_is_named_by_its_path(kind: str, number: int) -> None:
    documents = (yaml.safe_load(TEMPLATES[kind]),) if kind == "pytorchjob" else trainjob()

    def read(document: dict) -> None:
        parts = (*documents[:number], document, *documents[number + 1 :])
        read_all("\n---\n".join(json.dumps(part) for part in parts), kind)

    read(documents[number])
    refused = 0
    for path in places(documents[number]):
        for value in (KeyError, *VALUES):
            try:
                read(changed(documents[number], path, value))
            except ValueError as error:
                refused += 1
                message = str(error)
                assert "\n" not in message, (path, value)
                # a missing field is named after the path of its parent
                by_path = text_of(path[:-1]) in message and str(path[-1]) in message
                shorter = isinstance(path[-1], int) and text_of(path[:-1]) in message
                known = by_path or shorter or any(text in message for text in MEANING)
                assert known, (path, value, message)
            except Exception as error:
                raise AssertionError(f"{path}: {value!r}") from error
    assert refused > 20


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{Worker: }", "Worker: expected object, got null"),
        ("{Worker: {template: {spec: {}}}}", "Worker.template.spec: missing containers"),
    ],
)
def test_an_invalid_spec_is_rejected_with_its_path(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        validate(yaml.safe_load(f"kind: PyTorchJob\nspec: {{pytorchReplicaSpecs: {spec}}}\n"))
    where = "job manifest: PyTorchJob: spec.pytorchReplicaSpecs"
    assert str(error.value) == f"{where}.{message}"


POD = "spec.pytorchReplicaSpecs.Master.template.spec"


def pytorchjob(container: str = "", pod: str = "") -> dict:
    """Return a job with these fields in its container and its pod (YAML flow style)."""
    text = f"{{containers: [{{name: a{container}}}]{pod}}}"
    spec = f"{{pytorchReplicaSpecs: {{Master: {{template: {{spec: {text}}}}}}}}}"
    return yaml.safe_load(f"kind: PyTorchJob\nspec: {spec}\n")


@pytest.mark.parametrize("gpus", ["-1", "1.5", "8 GPUs"])
def test_an_invalid_number_of_gpus_is_rejected_with_its_path(gpus: str) -> None:
    job = pytorchjob(f", resources: {{limits: {{nvidia.com/gpu: {gpus}}}}}")
    with pytest.raises(ValueError) as error:
        validate(job)
    assert str(error.value) == (
        f"job manifest: PyTorchJob: {POD}.containers[0].resources.limits.nvidia.com/gpu: "
        f"expected a whole number, got {yaml.safe_load(gpus)!r}"
    )


@pytest.mark.parametrize(
    ("gpus", "found"), [("8", {"nvidia.com/gpu": 8}), ("'8'", {"nvidia.com/gpu": "8"}), ("", {})]
)
def test_a_number_of_gpus_may_be_text_or_null(gpus: str, found: dict) -> None:
    job = pytorchjob(f", resources: {{limits: {{nvidia.com/gpu: {gpus}}}}}")
    pod = validate(job)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert pod["containers"][0]["resources"] == {"limits": found}
    assert accelerators(yaml.safe_dump(job)).gpus == int(found.get("nvidia.com/gpu", 0))


@pytest.mark.parametrize(
    ("pod", "message"),
    [
        ("nodeSelector: {1: a}", "nodeSelector: expected only strings as keys, got 1"),
        ("nodeSelector: {b: , zone: [a]}", "nodeSelector.zone: expected bool | int | float | str"),
    ],
)
def test_an_invalid_entry_of_a_mapping_is_named_by_its_key(pod: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        validate(pytorchjob(pod=f", {pod}"))
    assert str(error.value).startswith(f"job manifest: PyTorchJob: {POD}.{message}")
    assert validate(pytorchjob(pod=", nodeSelector: {b: }"))["kind"] == "PyTorchJob"


def test_invalid_metadata_is_rejected_with_its_path() -> None:
    with pytest.raises(ValueError, match="PyTorchJob: metadata.annotations.a: expected "):
        validate({**pytorchjob(), "metadata": {"annotations": {"a": [1]}}})


@pytest.mark.parametrize(
    ("kind", "metadata", "message"),
    [
        ("TrainingRuntime", {}, "metadata: expected object, got null"),
        ("ClusterTrainingRuntime", {"metadata": {}}, "metadata: missing name"),
    ],
)
def test_a_runtime_needs_a_name(kind: str, metadata: dict, message: str) -> None:
    job, runtime = trainjob()
    del runtime["metadata"]
    text = yaml.safe_dump_all([job, {**runtime, **metadata, "kind": kind}])
    with pytest.raises(ValueError) as error:
        accelerators(text)
    assert str(error.value) == f"job manifest: {kind}: {message}"


def test_an_empty_patch_is_valid() -> None:
    job, runtime = trainjob()
    del job["spec"]["runtimePatches"]
    plain = accelerators(yaml.safe_dump_all([job, runtime]))
    for patch in ({"manager": "x"}, {"manager": "x", "trainingRuntimeSpec": None}):
        job["spec"]["runtimePatches"] = [patch]
        assert accelerators(yaml.safe_dump_all([job, runtime])) == plain


def test_null_fields_are_removed_and_other_documents_are_not_changed() -> None:
    job = pytorchjob(", env: ", ", tolerations: ")
    found = validate(job)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert found == {"containers": [{"name": "a"}]}
    assert validate({"kind": "ConfigMap", "data": None}) == {"kind": "ConfigMap", "data": None}
