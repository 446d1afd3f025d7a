"""Each of the typos planted in a copy of the manifests is detected."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

from tests.cluster.test_manifests import OVERLAYS, installed, overlay, pools
from tests.helpers.free_maps import unknown
from tests.helpers.manifests import kustomize, needs_kubectl, problems
from tests.helpers.schemas import misspelled

pytestmark = needs_kubectl
SECRETS = {
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_URI",
    "MLFLOW_TRACKING_USERNAME",
    "PGPASSWORD",
}


def swap(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text, f"{old} stands there no more"
        return text.replace(old, new)

    return change


TYPOS = {
    "a type": (
        "pytorchjob/pytorchjob.yaml",
        swap("enableServiceLinks: false", 'enableServiceLinks: "no"'),
    ),
    "the container's name": ("pytorchjob/pytorchjob.yaml", swap("name: pytorch ", "name: torch ")),
    "the master's count": (
        "pytorchjob/pytorchjob.yaml",
        swap("replicas: 1  # must", "replicas: 2  # must"),
    ),
    "the account": (
        "pytorchjob/pytorchjob.yaml",
        swap("AccountName: vitdet-train", "AccountName: vitdet-trains"),
    ),
    "the claim": ("shared/volume.yaml", swap("name: vitdet-data", "name: vitdet-date")),
    "the priority": ("cluster/priority.yaml", swap("name: vitdet-train", "name: vitdet-trian")),
    "the secret": ("pytorchjob/pytorchjob.yaml", swap("name: vitdet-mlflow", "name: vitdet-mflow")),
    "a mount": (
        "pytorchjob/pytorchjob.yaml",
        swap("{name: shm, mountPath", "{name: smh, mountPath"),
    ),
    "the pool": ("node-pools/eks/karpenter.yaml", swap("vitdet/pool", "vitdet/pools")),
    "a class of volumes": (
        "node-pools/eks/storage.yaml",
        swap("name: vitdet-gp3", "name: vitdet-gp2"),
    ),
    "a taint": (
        "node-pools/eks/karpenter.yaml",
        swap("key: nvidia.com/gpu", "key: nvidia.com/gpus"),
    ),
    "root": ("pytorchjob/pytorchjob.yaml", swap("runAsNonRoot: true", "runAsNonRoot: false")),
    "a writable root": (
        "mlflow/server.yaml",
        swap("readOnlyRootFilesystem: true", "readOnlyRootFilesystem: false"),
    ),
    "no seccomp": ("mlflow/database.yaml", swap("type: RuntimeDefault", "type: Unconfined")),
    "a floating tag": ("overlays/eks/values/values.yaml", swap("vitdet:0.2.0", "vitdet:latest")),
    "a service's selector": (
        "mlflow/server.yaml",
        swap(
            "selector: {app.kubernetes.io/name: mlflow}",
            "selector: {app.kubernetes.io/name: mlfow}",
        ),
    ),
    "a policy's selector": ("shared/network.yaml", swap("name: mlflow}", "name: mflow}")),
    "the binding's account": (
        "shared/accounts.yaml",
        swap(
            "{kind: ServiceAccount, name: vitdet-pipeline, namespace",
            "{kind: ServiceAccount, name: vitdet-pipelin, namespace",
        ),
    ),
    "a value's name": ("overlays/eks/values/values.yaml", swap("sharedMemory", "sharedMemori")),
    "a replaced place": ("components/values/job.yaml", swap("vitdet/pool", "vitdet/pol")),
    "the runtime's name": (
        "trainjob/trainjob.yaml",
        swap("name: vitdet-pool}", "name: vitde-pool}"),
    ),
    "the runtime's kind": (
        "trainjob/trainjob.yaml",
        swap("{kind: TrainingRuntime, ", "{kind: ClusterTrainingRuntime, "),
    ),
    "the namespace of the server": (
        "components/values/namespace.yaml",
        swap("select: {namespace: vitdet-mlflow}", "select: {namespace: vitdet-mlfow}"),
    ),
    "a pool's family": (
        "node-pools/eks/karpenter.yaml",
        swap("aws/instance-family", "aws/instance-famly"),
    ),
    "a removed field": (
        "trainjob/trainjob.yaml",
        swap("  trainer:", "  podTemplateOverrides: []\n  trainer:"),
    ),
    "a reserved variable": ("trainjob/runtime.yaml", swap("NCCL_DEBUG", "PET_NNODES")),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_noticed(typo: str, copy: Path) -> None:
    path, change = TYPOS[typo]
    (copy / path).write_text(change((copy / path).read_text()))
    try:
        name = "eks"
        folder = copy / "overlays" / name
        values = folder / "values" / "values.yaml"
        if "namespace" in path:
            values.write_text(values.read_text().replace("space: vitdet-mlflow", "space: tracking"))
        untouched = path.startswith(("pytorchjob", "trainjob"))
        cluster = installed(name, None if untouched else copy)
        jobs = kustomize(folder / "trainjob" if path.startswith("trainjob") else folder)
    except ValueError:
        return  # kubectl itself noticed
    assert problems(cluster, jobs, pools(name, copy, cluster)) != []


def keys(node: object, at: tuple = ()) -> Iterator[tuple]:
    """The path of each key."""
    for key, value in (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    ):
        if isinstance(node, dict):
            yield *at, key
        yield from keys(value, (*at, key))


def test_a_typo_in_any_key_is_noticed() -> None:
    """In each document of each overlay; those that several overlays share are tried once."""
    missed, tried, seen = set(), 0, set()
    for name in OVERLAYS:
        cluster, jobs = installed(name), [*overlay(name), *overlay(name, "trainjob")]
        nodes = pools(name)
        for document in [*cluster, *jobs]:
            text = json.dumps(document)
            if text in seen:
                continue
            seen.add(text)
            for *at, key in keys(document):
                changed = json.loads(text)
                place = reduce(getitem, at, changed)
                place[f"{key}x"] = place.pop(key)
                tried += 1
                try:
                    if misspelled(changed) or unknown(changed):
                        continue
                    there = [changed if one is document else one for one in (*cluster, *jobs)]
                    if not problems(there[: len(cluster)], there[len(cluster) :], nodes):
                        missed.add(f"{document['kind']}: {key}")
                except KeyError:
                    continue  # not so much as a kind or a name
    assert tried > 1400
    free = {"ConfigMap: account.py", "ConfigMap: basic_auth.ini"}
    assert missed <= free | {f"Secret: {key}" for key in SECRETS}
