"""The ClusterRoles that Kubeflow binds in a profile, limited to the resources of these manifests.

Sources of the rules: kubeflow/manifests
common/kubeflow-roles/base/cluster-roles.yaml, kubeflow/pipelines
manifests/kustomize/base/installs/multi-user/view-edit-cluster-roles.yaml, kubeflow/training-operator
manifests/overlays/kubeflow/kubeflow-training-roles.yaml, kubeflow/trainer
manifests/overlays/kubeflow-platform/kubeflow-trainer-roles.yaml.
"""

from __future__ import annotations

READ = ["get", "list", "watch"]
WRITE = ["create", "delete", "deletecollection", "patch", "update"]
ALL = [*READ, "create", "delete", "patch", "update"]
CORE = ["configmaps", "persistentvolumeclaims", "secrets", "serviceaccounts", "services"]
Rule = tuple[str, list[str], list[str]]  # API group, resources, verbs
EDIT: list[Rule] = [
    ("", ["secrets", "pods/exec", "pods/portforward"], READ),
    ("", ["pods", "pods/exec", "pods/portforward", *CORE], WRITE),
    ("apps", ["deployments", "statefulsets"], WRITE),
    ("batch", ["jobs", "cronjobs"], WRITE),
    ("networking.k8s.io", ["ingresses", "networkpolicies"], WRITE),
    ("", ["configmaps", "persistentvolumeclaims", "pods", "serviceaccounts", "services"], READ),
    ("", ["events", "pods/log", "resourcequotas"], READ),
    ("apps", ["deployments", "statefulsets"], READ),
    ("batch", ["jobs", "cronjobs"], READ),
    ("networking.k8s.io", ["ingresses", "networkpolicies"], READ),
    ("kubeflow.org", ["pytorchjobs"], ALL),
    ("argoproj.io", ["workflows"], ["*"]),
    ("pipelines.kubeflow.org", ["runs"], ["get", "list", "create", "delete", "terminate"]),
]
# roles of an early release of Kubeflow Trainer, with the wrong API group, and of a later release
RUNTIMES = ("trainer.kubeflow.org", ["trainingruntimes"], READ)
JOBS = ("trainer.kubeflow.org", ["trainjobs"], [*READ, "create", "delete", "patch"])
TRAINER = {"early": [("kubeflow.org", ["trainjobs"], ALL), RUNTIMES], "later": [JOBS, RUNTIMES]}
# additional rules of newer releases of Kubeflow Pipelines
PIPELINES = [
    ("argoproj.io", ["workflowtaskresults"], ["*"]),
    ("pipelines.kubeflow.org", ["runs"], ["reportMetrics", "readArtifact"]),
]
RELEASES = {"early": EDIT + TRAINER["early"], "later": EDIT + TRAINER["later"] + PIPELINES}
ADMIN: list[Rule] = [
    ("rbac.authorization.k8s.io", ["roles", "rolebindings"], [*READ, *WRITE]),
    ("authorization.k8s.io", ["localsubjectaccessreviews"], ["create"]),
]
AGGREGATE = "rbac.authorization.kubeflow.org/aggregate-to-kubeflow-edit"


def profile_roles(suffix: str, release: str, ours: dict | None) -> list[dict]:
    """Return ClusterRoles kubeflow-edit-SUFFIX and kubeflow-admin-SUFFIX of a release.

    The rules of `ours`, a ClusterRole, are added if it has the aggregation label: the test control plane has no
    controller for aggregated ClusterRoles.
    """
    joined = []
    if ours is not None and ours["metadata"]["labels"].get(AGGREGATE) == "true":
        joined = ours["rules"]
    found = []
    for name, rules in {"edit": RELEASES[release], "admin": RELEASES[release] + ADMIN}.items():
        listed = [
            {"apiGroups": [group], "resources": resources, "verbs": verbs}
            for group, resources, verbs in rules
        ]
        role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole"}
        role |= {"metadata": {"name": f"kubeflow-{name}-{suffix}"}, "rules": listed + joined}
        found.append(role)
    return found
