"""Failures of a training job on a real API server; the pods' processes are shell scripts.

The tests write the statuses that the kubelet and the scheduler would write: PodStatus and PodCondition of core/v1, see
https://kubernetes.io/docs/reference/generated/kubernetes-api/v1.33/#podstatus-v1-core; image errors:
k8s.io/kubernetes/pkg/kubelet/images/types.go; eviction: pkg/kubelet/eviction/helpers.go; Unschedulable:
pkg/scheduler/schedule_one.go. Kueue suspends a PyTorchJob by spec.runPolicy.suspend
(kubernetes-sigs/kueue, pkg/controller/jobs/kubeflow/jobs/pytorchjob).
"""

from __future__ import annotations

import base64
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from kubernetes import client

from components.launcher.launch import delete_jobs
from components.launcher.templates import ERRORS, FAILURE, job_name
from tests.cluster.test_launcher import UNSCHEDULABLE
from tests.helpers.cluster import (
    PATIENT,
    PIPELINE_RUN,
    Scene,
    kubectl,
    on_cluster,
    scene,
    template,
    wait_until,
)

pytestmark = on_cluster


def script(**policy: object) -> str:
    """Return a job file whose args are a shell script, with these fields in its runPolicy."""
    job = yaml.safe_load(template(script=True))
    job["spec"]["runPolicy"].update(policy)
    job["metadata"].pop("annotations", None)  # the job file's own timeout for nodes
    return yaml.safe_dump(job)


@contextmanager
def meanwhile(act: Callable[[], object]) -> Iterator[None]:
    """Run `act` in a thread during the block. Its error interrupts the block and fails the test."""
    ended, test = threading.Event(), threading.get_ident()

    def run() -> None:
        try:
            act()
        except BaseException:
            if not ended.is_set():  # otherwise the launcher could wait in vain
                signal.pthread_kill(test, signal.SIGINT)
            raise

    done = ThreadPoolExecutor(1).submit(run)
    try:
        yield
    finally:
        ended.set()
        done.result()


def running(made: Scene, recipe: str) -> object:
    """Wait until rank 0's script has written a line."""
    name = f"{job_name(PIPELINE_RUN, recipe)}-master-0"
    return wait_until(lambda: name in made.node.containers and made.node.containers[name].lines[0])


def gone(made: Scene, recipe: str) -> None:
    """Wait until the job and its pods are deleted; assert that their processes have ended."""
    wait_until(lambda: made.job(recipe) is None and not made.pods(recipe))
    name = job_name(PIPELINE_RUN, recipe)
    assert all(
        container.process.poll() is not None
        for key, container in made.node.containers.items()
        if key.startswith(name)
    )


def write_status(made: Scene, name: str, status: dict) -> None:
    """Write a pod's status, as the kubelet would."""
    client.CoreV1Api().patch_namespaced_pod_status(name, made.namespace, {"status": status})


def both_pods(made: Scene, recipe: str, run: str = PIPELINE_RUN) -> list[dict]:
    """Return the pods of Master and Worker as soon as they exist."""
    return wait_until(lambda: len(found := made.pods(recipe, run)) == 2 and found)


def worker(made: Scene, recipe: str) -> str:
    return both_pods(made, recipe)[1]["metadata"]["name"]


def evicted(resource: str) -> dict:
    """Return the status of a pod that the kubelet evicts for lack of this resource."""
    message = f"The node was low on resource: {resource}. "
    about = {"phase": "Failed", "reason": "Evicted", "message": message}
    return {**about, "containerStatuses": []}


def test_a_job_deleted_by_another_client_fails_the_step(live: Scene) -> None:
    def delete() -> None:
        running(live, "deleted")
        name = job_name(PIPELINE_RUN, "deleted")
        kubectl(f"delete pytorchjob -n {live.namespace} {name} --wait=false")

    text = "was deleted before training was complete: by another client, with its owner"
    with meanwhile(delete), pytest.raises(RuntimeError, match=text):
        live.launch(script(), ["echo on; sleep 60"], "deleted")
    gone(live, "deleted")


def test_sigterm_outside_a_pipeline_deletes_the_job(live: Scene) -> None:
    launcher = live.start(script(), ["echo on; sleep 60"], "stopped", {})
    running(live, "stopped")
    launcher.terminate()
    output, _ = launcher.communicate()
    assert launcher.returncode == 143 and "this step is being stopped" in output
    gone(live, "stopped")


def test_a_retried_step_follows_the_existing_job(live: Scene) -> None:
    first, second = live.step_pod("step-first"), live.step_pod("step-second", attempt=1)
    lost = live.start(script(), ["echo on; sleep 12; echo off"], "retried", first)
    running(live, "retried")
    lost.kill()
    uid = live.job("retried")["metadata"]["uid"]
    again = live.start(script(), ["another script"], "retried", second)
    kubectl(f"delete pod -n {live.namespace} step-first --wait=false")
    output, _ = again.communicate()
    assert again.returncode == 0 and "following it" in output and "on\n" in output
    assert "off\n" in output
    assert live.job("retried")["metadata"]["uid"] == uid


def test_a_container_out_of_memory_ends_the_job_at_once_with_its_last_lines(live: Scene) -> None:
    dying = "echo working; if [ $RANK = 1 ]; then seq 100; sleep 1; kill -9 $$; fi; sleep 60"
    with pytest.raises(RuntimeError) as raised:
        live.launch(script(), [dying], "oom")
    head, *tail = str(raised.value).split("\n  ")
    name = job_name(PIPELINE_RUN, "oom")
    assert head.startswith(f"PyTorchJob {name} ran out of memory: raise the memory limit")
    where = f"cause: pod {name}-worker-0 on node {live.node.name}"
    assert f"{where}: OOMKilled, exit code 137 (SIGKILL)" in head
    assert tail[:-1] == [str(number) for number in range(71, 100)] and "100" in tail[-1]
    wait_until(lambda: not live.pods("oom"))  # the operator deletes the pods of a suspended job


def test_a_container_that_keeps_failing_ends_the_job_after_its_restarts(live: Scene) -> None:
    failing = "if [ $RANK = 1 ]; then sleep 1; echo no such image; exit 3; fi; sleep 60"
    # The launcher may wait for a fourth failure: the node of the Master could be lost.
    with pytest.raises(RuntimeError, match=r"has failed \(errors: [34], ") as raised:
        live.launch(script(backoffLimit=2), [failing], "failing")
    assert "no such image; the job is suspended" in str(raised.value)
    annotations = live.job("failing")["metadata"]["annotations"]
    assert annotations[ERRORS] in ("3", "4") and annotations[FAILURE] == str(raised.value)


def test_an_evicted_pod_is_logged_and_replaced(live: Scene) -> None:
    def evict() -> None:
        running(live, "evicted")
        write_status(live, worker(live, "evicted"), evicted("memory"))

    with meanwhile(evict):
        live.launch(script(), ["echo on; sleep 6"], "evicted")
    lines = [line for line in live.lines if job_name(PIPELINE_RUN, "evicted") in line]
    assert any("Evicted: The node was low on resource: memory." in line for line in lines)
    assert lines[-1].endswith("is successfully completed.)")


def test_the_launcher_waits_for_a_job_suspended_by_kueue(live: Scene) -> None:
    def admit() -> None:
        wait_until(lambda: any("suspended until a queue (Kueue)" in line for line in live.lines))
        time.sleep(7)  # longer than the timeouts for the operator, a node and a start
        words = f"patch pytorchjob -n {live.namespace} {job_name(PIPELINE_RUN, 'queued')}"
        kubectl(f"{words} --type=merge -p", '{"spec": {"runPolicy": {"suspend": false}}}')

    timeouts = replace(PATIENT, operator=5, start=5, schedule=5)
    with meanwhile(admit):
        live.launch(script(suspend=True), ["echo admitted"], "queued", timeouts=timeouts)
    assert "admitted" in live.lines


PULLING = {"reason": "ImagePullBackOff", "message": 'Back-off pulling image "vitdet:typo"'}
CONTAINER = {"name": "pytorch", "image": "vitdet:typo", "imageID": "", "restartCount": 0}
STATE = {"ready": False, "started": False, "state": {"waiting": PULLING}}
IMAGE = {"phase": "Pending", "containerStatuses": [{**CONTAINER, **STATE}]}
NEVER = {**UNSCHEDULABLE, "lastTransitionTime": "2026-01-01T00:00:00Z"}
NO_NODE = {"phase": "Pending", "conditions": [NEVER]}


@pytest.mark.parametrize(
    ("recipe", "status", "text"),
    [
        ("image", IMAGE, 'ImagePullBackOff: Back-off pulling image "vitdet:typo"'),
        ("no-node", NO_NODE, f"Unschedulable: {UNSCHEDULABLE['message']}"),
    ],
)
def test_a_pod_that_cannot_start_fails_the_step(
    still: Scene, recipe: str, status: dict, text: str
) -> None:
    write = meanwhile(lambda: write_status(still, worker(still, recipe), status))
    with write, pytest.raises(RuntimeError) as raised:
        still.launch(script(), ["true"], recipe)
    assert f"-worker-0: {text}; the job is suspended" in str(raised.value)
    assert any(text in line and "waiting" in line for line in still.lines)
    wait_until(lambda: not still.pods(recipe))


def test_a_missing_operator_is_reported(tmp_path: Path) -> None:
    text = "the Kubeflow training operator .v1.9. is not running; the job is suspended"
    with scene(tmp_path, node=False, operator=False) as empty:
        with pytest.raises(RuntimeError, match=text):
            empty.launch(script(), ["true"], "nobody", timeouts=replace(PATIENT, operator=3))


def test_only_the_jobs_of_a_run_are_deleted(still: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(still.kubeconfig))
    given = yaml.safe_load(template())
    for name, run in (("a", "mine"), ("b", "mine"), ("c", "other")):
        labels = {"vitdet/run": run}
        given["metadata"] = {"name": name, "namespace": still.namespace, "labels": labels}
        kubectl("create -f -", given=given)
    assert sorted(delete_jobs("mine")[0]) == ["a", "b"]
    assert delete_jobs("mine", still.namespace) == ([], [])
    assert "c" in kubectl(f"get pytorchjobs -n {still.namespace} -o name")


@pytest.fixture
def account(live: Scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the launcher as the pipeline's service account, with only the Role of manifests/shared."""
    shared = Path(__file__).parents[2] / "manifests/shared/accounts.yaml"
    for part in yaml.safe_load_all(shared.read_text()):
        if part["kind"] not in ("ServiceAccount", "Role", "RoleBinding"):
            continue
        part["metadata"]["namespace"] = live.namespace
        for subject in part.get("subjects", []):
            subject["namespace"] = live.namespace
        kubectl("apply -f -", given=part)

    def tokens() -> list[dict]:
        found = json.loads(kubectl(f"get secrets -n {live.namespace} -o json"))["items"]
        own = ("kubernetes.io/service-account.name", "vitdet-pipeline")
        made = [document for document in found if "data" in document]
        return [job for job in made if own in job["metadata"].get("annotations", {}).items()]

    secret = wait_until(tokens)[0]
    settings = yaml.safe_load(live.kubeconfig.read_text())
    settings["users"][0]["user"] = {"token": base64.b64decode(secret["data"]["token"]).decode()}
    (tmp_path / "account").write_text(yaml.safe_dump(settings))
    monkeypatch.setattr(live, "kubeconfig", tmp_path / "account")


def test_the_role_of_the_manifests_is_sufficient_and_necessary(live: Scene, account: None) -> None:
    live.launch(script(), ["echo with rights"], "allowed")
    assert "with rights" in live.lines

    def revoke() -> None:
        running(live, "revoked")
        kubectl(f"delete rolebindings --all -n {live.namespace}")

    # either request may be sent first
    text = "vitdet-pipeline has no Role that allows (get on pytorchjobs.kubeflow.org|list on pods)"
    with meanwhile(revoke), pytest.raises(RuntimeError, match=text):
        live.launch(script(), ["echo on; sleep 60"], "revoked")
    with pytest.raises(
        RuntimeError, match="has no Role that allows create on pytorchjobs"
    ) as raised:
        live.launch(script(), ["true"], "refused")
    assert "\n" not in str(raised.value)
