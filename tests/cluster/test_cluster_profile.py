"""Permissions of a Kubeflow profile's owner and contributors, with Kubeflow's roles on a real API server."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.cluster.test_cluster_manifests import exercise_launcher, may
from tests.cluster.test_manifests import JOBS, MANIFESTS
from tests.cluster.test_profile import OWNER, for_profile
from tests.helpers.cluster import kubectl, on_cluster, wait_until
from tests.helpers.kubeflow_roles import RELEASES, profile_roles
from tests.helpers.manifests import kustomize, needs_kubectl

pytestmark = [*on_cluster, needs_kubectl]
RUNTIMES = "trainingruntimes.trainer.kubeflow.org"
OURS = MANIFESTS / "cluster" / "profile-roles.yaml"


class Profile(NamedTuple):
    namespace: str
    owner: str  # user, bound to kubeflow-admin
    contributor: str  # user, bound to kubeflow-edit


def binding(name: str, role: str, subject: dict) -> dict:
    about = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "RoleBinding"}
    return {
        **about,
        "metadata": {"name": name},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
        "subjects": [subject],
    }


@contextmanager
def profile_of(release: str, ours: dict | None) -> Iterator[Profile]:
    """Create a namespace as the profile controller does; `ours` is our ClusterRole, if applied."""
    suffix = uuid.uuid4().hex[:8]
    made = Profile(f"vitdet-profile-{suffix}", f"owner-{suffix}", f"friend-{suffix}")
    roles = profile_roles(suffix, release, ours)
    kubectl(f"create namespace {made.namespace}")
    kubectl("apply -f -", given=yaml.safe_dump_all(roles))
    kubectl(f"create serviceaccount default-editor -n {made.namespace}")
    editor = {"kind": "ServiceAccount", "name": "default-editor", "namespace": made.namespace}
    user = {"kind": "User", "apiGroup": "rbac.authorization.k8s.io"}
    bindings = [
        binding("owner", f"kubeflow-admin-{suffix}", {**user, "name": made.owner}),
        binding("friend", f"kubeflow-edit-{suffix}", {**user, "name": made.contributor}),
        binding("default-editor", f"kubeflow-edit-{suffix}", editor),
    ]
    kubectl(f"apply -n {made.namespace} -f -", given=yaml.safe_dump_all(bindings))
    try:
        granted = RUNTIMES if ours else "roles.rbac.authorization.k8s.io"
        wait_until(lambda: may(made.owner, made.namespace, "create", granted), 60)
        yield made
    finally:
        kubectl(f"delete namespace {made.namespace} --wait=false")
        for role in roles:
            kubectl(f"delete clusterrole {role['metadata']['name']} --wait=false")


@pytest.fixture(params=RELEASES)
def profile(request: pytest.FixtureRequest) -> Iterator[Profile]:
    with profile_of(request.param, yaml.safe_load(OURS.read_text())) as made:
        yield made


def test_the_owner_can_apply_everything(profile: Profile, copy: Path) -> None:
    folder = for_profile(copy, "eks", profile.namespace, profile.namespace)
    documents = [document for part in (*OWNER, "mlflow") for document in kustomize(folder / part)]
    said = kubectl(f"apply --as={profile.owner} -f -", given=yaml.safe_dump_all(documents))
    assert said.count(" created") == len(documents) > 15


def test_contributors_can_apply_everything_except_rbac(profile: Profile, copy: Path) -> None:
    folder = for_profile(copy, "onprem", profile.namespace, profile.namespace)
    documents = [document for part in OWNER for document in kustomize(folder / part)]
    for document in documents:
        role = document["kind"] in ("Role", "RoleBinding")
        said = kubectl(f"apply --as={profile.contributor} -f -", given=document, fails=role)
        assert ("forbidden" in said) == role, said


def test_runs_from_kubeflows_dashboard_may_launch_jobs(profile: Profile) -> None:
    """They run as default-editor, to which the guide's command adds the pull secret."""
    for kind in JOBS:
        exercise_launcher(kind, profile.namespace, "default-editor")
    patch = '{"imagePullSecrets": [{"name": "vitdet-registry"}]}'
    words = ("patch", "serviceaccount", "default-editor", "-n", profile.namespace, "-p", patch)
    kubectl(*words, f"--as={profile.contributor}")
    found = json.loads(kubectl(f"get serviceaccount default-editor -n {profile.namespace} -o json"))
    assert found["imagePullSecrets"] == [{"name": "vitdet-registry"}]


@pytest.mark.parametrize("release", RELEASES)
def test_without_our_role_the_owner_cannot_grant_permissions_that_kubeflows_roles_lack(
    release: str,
) -> None:
    """cluster/profile-roles.yaml is needed: RBAC lets users grant only permissions that they hold."""
    accounts = yaml.safe_load_all((MANIFESTS / "shared" / "accounts.yaml").read_text())
    (role,) = (document for document in accounts if document["kind"] == "Role")
    resources = {"trainjobs", "workflowtaskresults", "workloads"}
    with profile_of(release, None) as made:
        role["metadata"]["namespace"] = made.namespace
        said = kubectl(f"apply --as={made.owner} -f -", given=role, fails=True)
        assert "attempting to grant RBAC permissions not currently held" in said
        lacking = resources if release == "early" else {"workloads"}
        assert {resource for resource in resources if resource in said} == lacking
        assert not may(made.owner, made.namespace, "create", RUNTIMES)
