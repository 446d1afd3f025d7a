"""Typos that are inserted into a copy of the manifests are detected."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from operator import getitem
from pathlib import Path

import pytest

from tests.cluster.test_manifests import OVERLAYS, installed, overlay, pools
from tests.helpers.free_maps import unknown
from tests.helpers.manifests import kustomize, needs_kubectl, problems
from tests.helpers.schemas import misspelled

pytestmark = needs_kubectl
SECRETS = (
    "AWS_ACCESS_KEY_ID AWS_SECRET_ACCESS_KEY MLFLOW_AUTH_ADMIN_PASSWORD PGPASSWORD "
    "MLFLOW_FLASK_SERVER_SECRET_KEY MLFLOW_TRACKING_PASSWORD MLFLOW_TRACKING_URI "
    "MLFLOW_TRACKING_USERNAME"
).split()


# one per kind of rule: (file, text, replacement)
TYPOS = {
    "a type": ("pytorchjob/pytorchjob.yaml", "Links: false", 'Links: "no"'),
    "the container's name": ("pytorchjob/pytorchjob.yaml", "name: pytorch ", "name: torch "),
    "the master's count": (
        "pytorchjob/pytorchjob.yaml",
        "replicas: 1  # required",
        "replicas: 2  #",
    ),
    "the account": ("pytorchjob/pytorchjob.yaml", "Name: vitdet-train", "Name: vitdet-trains"),
    "the claim": ("shared/volume.yaml", "name: vitdet-data", "name: vitdet-date"),
    "the secret": ("pytorchjob/pytorchjob.yaml", "name: vitdet-mlflow", "name: vitdet-mflow"),
    "a mount": ("pytorchjob/pytorchjob.yaml", "{name: shm, mountPath", "{name: smh, mountPath"),
    "the pool": ("node-pools/eks/karpenter.yaml", "vitdet/pool", "vitdet/pools"),
    "a class of volumes": ("node-pools/eks/storage.yaml", "name: vitdet-gp3", "name: vitdet-gp2"),
    "a taint": ("node-pools/eks/karpenter.yaml", "key: nvidia.com/gpu", "key: nvidia.com/gpus"),
    "root": ("pytorchjob/pytorchjob.yaml", "runAsNonRoot: true", "runAsNonRoot: false"),
    "a writable root": ("mlflow/server.yaml", "Filesystem: true", "Filesystem: false"),
    "no seccomp": ("mlflow/database.yaml", "type: RuntimeDefault", "type: Unconfined"),
    "a floating tag": ("overlays/eks/values/values.yaml", "vitdet:0.2.0", "vitdet:latest"),
    "a service's selector": (
        "mlflow/server.yaml",
        "selector: {app.kubernetes.io/name: mlflow}",
        "selector: {app.kubernetes.io/name: mlfow}",
    ),
    "a policy's selector": ("shared/network.yaml", "name: mlflow}", "name: mflow}"),
    "the binding's account": ("shared/accounts.yaml", "name: vitdet-pipeline,", "name: pipeline,"),
    "a replaced place": ("components/values/job.yaml", "vitdet/pool", "vitdet/pol"),
    "the runtime's name": ("trainjob/trainjob.yaml", "name: vitdet-pool}", "name: vitde-pool}"),
    "the server's namespace": ("components/values/namespace.yaml", "vitdet-mlflow}", "mlflow}"),
    "a pool's family": ("node-pools/eks/karpenter.yaml", "instance-family", "instance-famly"),
    "a removed field": ("trainjob/trainjob.yaml", "  trainer:", "  podTemplates: []\n  trainer:"),
    "a reserved variable": ("trainjob/runtime.yaml", "NCCL_DEBUG", "PET_NNODES"),
}


@pytest.mark.parametrize("typo", TYPOS)
def test_a_typo_is_detected(typo: str, copy: Path) -> None:
    path, old, new = TYPOS[typo]
    text = (copy / path).read_text()
    assert old in text
    (copy / path).write_text(text.replace(old, new))
    try:
        folder = copy / "overlays" / "eks"
        values = folder / "values" / "values.yaml"
        if "namespace" in path:
            values.write_text(values.read_text().replace("space: vitdet-mlflow", "space: tracking"))
        untouched = path.startswith(("pytorchjob", "trainjob"))
        cluster = installed("eks", None if untouched else copy)
        jobs = kustomize(folder / "trainjob" if path.startswith("trainjob") else folder)
    except ValueError:
        return  # detected by kubectl itself
    assert problems(cluster, jobs, pools("eks", copy, cluster)) != []


def keys(node: object, at: tuple = ()) -> Iterator[tuple]:
    """Yield the path of each key."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield *at, key
            yield from keys(value, (*at, key))
    elif isinstance(node, list):
        for number, value in enumerate(node):
            yield from keys(value, (*at, number))


def test_a_typo_in_any_key_is_detected() -> None:
    """This covers all documents of all overlays; shared documents are tested once."""
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
                    there = [changed if other is document else other for other in (*cluster, *jobs)]
                    if not problems(there[: len(cluster)], there[len(cluster) :], nodes):
                        missed.add(f"{document['kind']}: {key}")
                except KeyError:
                    continue  # detected: it has no kind or no name
    assert tried > 1400
    free = {"ConfigMap: account.py", "ConfigMap: basic_auth.ini"}
    assert missed <= free | {f"Secret: {key}" for key in SECRETS}
