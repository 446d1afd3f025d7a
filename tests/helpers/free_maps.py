"""Maps of Kubernetes objects whose keys no schema lists: labels, annotations, resources and the like.

The API server accepts a misspelled key, which has no effect: a pod lacks its GPU, or gets a sidecar, or is evicted.
So every key that manifests/ and the launcher use is listed here.
"""

from __future__ import annotations

from collections.abc import Iterator

LABELS = {
    "app.kubernetes.io/component",
    "app.kubernetes.io/name",
    "app.kubernetes.io/part-of",
    "cloud.google.com/compute-class",  # set by GKE for a ComputeClass
    "kubernetes.io/metadata.name",  # set by the API server on each namespace
    "kueue.x-k8s.io/priority-class",
    "kueue.x-k8s.io/queue-name",
    "pipelines.kubeflow.org/enabled",
    "pod-security.kubernetes.io/audit",
    "pod-security.kubernetes.io/enforce",
    "pod-security.kubernetes.io/warn",
    "rbac.authorization.kubeflow.org/aggregate-to-kubeflow-edit",
    "trainer.kubeflow.org/framework",
    "trainer.kubeflow.org/trainjob-ancestor-step",
    "vitdet/pool",
    "vitdet/run",
    "vitdet/scope",
}
RESOURCES = {"cpu", "memory", "nvidia.com/gpu", "rdma/rdma_shared_device_a", "storage"}
KNOWN = {
    "labels": LABELS,
    "matchLabels": LABELS,
    "nodeSelector": LABELS,
    "annotations": {
        "cluster-autoscaler.kubernetes.io/safe-to-evict",
        "karpenter.sh/do-not-disrupt",
        "nginx.ingress.kubernetes.io/proxy-body-size",
        "sidecar.istio.io/inject",
        "vitdet/restarts",
        "vitdet/schedule-seconds",
    },
    "requests": RESOURCES,
    "limits": RESOURCES,
    "parameters": set(
        "directoryPerms encrypted fileSystemId gid provisioningMode type uid".split()
    ),
    "tags": {"karpenter.sh/discovery"},
}
SELECTORS = {"Service": "selector"}  # kind -> the field with a map of labels


def unknown(document: dict) -> list[str]:
    """Return the keys of the object's maps that are not listed here."""
    kind = document["kind"]
    name = f"{kind} {document['metadata']['name']}"
    return [f"{name}: {where}: unknown key {key}" for where, key in _keys(document, "", kind)]


def _keys(node: object, where: str, kind: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, list):
        for number, item in enumerate(node):
            yield from _keys(item, f"{where}.{number}", kind)
    elif isinstance(node, dict):
        for key, value in node.items():
            known = LABELS if SELECTORS.get(kind) == key else KNOWN.get(key)
            if known is not None and isinstance(value, dict):
                yield from ((f"{where}.{key}", name) for name in value if name not in known)
            yield from _keys(value, f"{where}.{key}", kind)
