"""Jobs with holes: any field that is null, missing or of another type is one line, or does not matter."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from components.launcher.schema import checked
from components.launcher.templates import KINDS, fill_template, mount_paths, process_counts
from pipeline.job_manifests import accelerators, job_image, training_jobs
from tests.test_launcher import TEMPLATES, request

VALUES: tuple[Any, ...] = (None, "text", [None])


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of everything inside a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, one in items:
        if "Worker" in path:
            continue  # as the Master
        yield (*path, key)
        if isinstance(one, dict | list):
            yield from places(one, (*path, key))


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
    """Everything that compilation and the launcher read of a job."""
    jobs = training_jobs(text)
    job_image(jobs)
    accelerators(text)
    job = fill_template(text, KINDS[kind], request(nodes=2))
    mount_paths(KINDS[kind], job)
    process_counts(KINDS[kind], job)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_hole_in_a_job_is_a_traceback(kind: str) -> None:
    (job,) = (one for one in yaml.safe_load_all(TEMPLATES[kind]) if one["kind"] == KINDS[kind].name)
    if kind == "trainjob":  # its runtime, which else says this, is another file
        job["spec"].setdefault("trainer", {})["resourcesPerNode"] = {
            "limits": {"nvidia.com/gpu": 8}
        }
    read_all(json.dumps(job), kind)
    refused = 0
    for path in places(job):
        for value in (KeyError, *VALUES):
            try:
                read_all(json.dumps(changed(job, path, value)), kind)
            except ValueError as error:
                refused += 1
                assert "\n" not in str(error), (path, value)
            except Exception as error:
                raise AssertionError(f"{path}: {value!r}") from error
    assert refused > 40


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "{pytorchReplicaSpecs: {Worker: }}",
            "spec.pytorchReplicaSpecs.Worker: expected object, got null",
        ),
        ("{pytorchReplicaSpecs: {}}", "spec.pytorchReplicaSpecs: expected object of length >= 1"),
        (
            "{pytorchReplicaSpecs: {Worker: {template: {spec: {}}}}}",
            "spec.pytorchReplicaSpecs.Worker.template.spec: missing containers",
        ),
        (
            "{pytorchReplicaSpecs: {Master: {template: {spec: {containers: [{name: }]}}}}}",
            "spec.pytorchReplicaSpecs.Master.template.spec.containers[0].name: expected str, got null",
        ),
        ("{}", "spec: missing pytorchReplicaSpecs"),
    ],
)
def test_a_hole_is_named_by_its_path(spec: str, message: str) -> None:
    with pytest.raises(ValueError) as error:
        checked(yaml.safe_load(f"kind: PyTorchJob\nspec: {spec}\n"))
    assert str(error.value) == f"the job's file: its PyTorchJob: {message}"


def test_null_is_an_absent_field_and_other_documents_are_left_alone() -> None:
    pod = {"containers": [{"name": "a", "env": None}], "tolerations": None}
    job = {
        "kind": "PyTorchJob",
        "spec": {"pytorchReplicaSpecs": {"Master": {"template": {"spec": pod}}}},
    }
    found = checked(job)["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    assert found == {"containers": [{"name": "a"}]}
    assert checked({"kind": "ConfigMap", "data": None}) == {"kind": "ConfigMap", "data": None}
