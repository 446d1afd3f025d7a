"""Events of jobs whose pods are not created or do not start; API responses are stubbed."""

from __future__ import annotations

import pytest

from components.launcher.status import (
    blocking_reason,
    failure_reason,
    missing_pods,
    startup_warning,
)
from tests.cluster.test_following import DONE, RUNNING, Record, follow
from tests.cluster.test_kube_requests import answers, cluster, refused
from tests.cluster.test_launcher import conditions, pod, waiting

NAME = "vitdet-tiny-1"


def event(reason: str, message: str = "", of: str = NAME, **changes: str) -> dict:
    about = {"type": "Warning", "reason": reason, "message": message, "metadata": {}}
    rest = {"lastTimestamp": "2026-01-01T00:00:05Z", "involvedObject": {"name": of}}
    return {**about, **rest, **changes}


QUOTA = event("FailedCreatePod", 'Error creating: pods "x" is forbidden:\n exceeded quota: gpus')


@pytest.mark.parametrize("look", [({}, []), (RUNNING, [pod()])])
def test_a_rejected_pod_is_logged_and_then_fails_the_step(look: tuple) -> None:
    record = Record(look)
    record.warnings = [QUOTA, event("Other", "no cause")]
    lines, error = follow(record)
    text = 'Error creating: pods "x" is forbidden: exceeded quota: gpus'
    said = f"job {NAME}: FailedCreatePod: {text}"
    assert lines.count(f"launcher: waiting: {said}") == 1
    assert f"{NAME} has not been able to start for 0 s\ncause: {said}" in error
    assert error.endswith("; the job is suspended")
    assert "is not running" not in error and record.asked == ["create", "halt"]


def test_rejections_are_ignored_if_a_job_is_suspended_or_has_all_pods() -> None:
    for look in ((conditions("Suspended=True"), []), (RUNNING, [pod("a"), pod("b")])):
        record = Record(*[look] * 30, (DONE, []))
        record.warnings = [QUOTA]
        assert follow(record)[1] == ""


def test_a_trainjobs_rejections_exclude_other_jobs_and_earlier_events() -> None:
    job = {
        "metadata": {"name": NAME, "uid": "1", "creationTimestamp": "2026-01-01T00:00:01Z"},
        "spec": {"trainer": {"numNodes": 2}},
    }
    asked: list[str] = []

    def ask(selector: str) -> list[dict]:
        asked.append(selector)
        return found

    found = [
        event("FailedCreate", "old", f"{NAME}-node-0", lastTimestamp="2026-01-01T00:00:00Z"),
        event("FailedCreate", "other", of=f"{NAME}1-node-0"),
    ]
    assert missing_pods(job, [], ask) is None and asked == ["type=Warning,involvedObject.kind!=Pod"]
    found.append(event("FailedCreate", "mine", of=f"{NAME}-node-0"))
    assert str(missing_pods(job, [], ask)) == f"job {NAME}: FailedCreate: mine"
    assert missing_pods(job, [pod(), pod()], ask) is None
    # Trainer 2.3 (trainjob_controller.go), e.g. without the CRD of PodGroups; JobSet 0.12 (pkg/constants)
    for reason in (
        "TrainJobResourcesCreationFailed",
        "JobCreationFailed",
        "HeadlessServiceCreationFailed",
    ):
        found[:] = [event(reason, "no matches for kind")]
        assert str(missing_pods(job, [], ask)) == f"job {NAME}: {reason}: no matches for kind"


def test_a_pod_without_its_volume_is_logged_and_then_fails_the_step() -> None:
    creating = waiting(reason="ContainerCreating")
    record = Record((conditions("Created=True"), [creating, pod("b")]))
    record.warnings = [
        event("FailedMount", "driver nfs.csi.k8s.io not found"),
        event("Scheduled", type="Normal", lastTimestamp=""),
    ]
    lines, error = follow(record)
    assert "cause: pod w-0: FailedMount: driver nfs.csi.k8s.io not found" in error
    assert sum("waiting: pod w-0: FailedMount" in line for line in lines) == 1
    pulling = event("Pulling", type="Normal", lastTimestamp="2026-01-01T00:00:06Z")
    # a large image is still being pulled
    assert startup_warning(creating, lambda _: [*record.warnings, pulling]) is None


def crashing(state: dict, code: int = 7, count: int = 4) -> dict:
    last = {"terminated": {"exitCode": code, "reason": "Error"}}
    status = {"name": "wait", "restartCount": count, "ready": False, "state": state}
    return pod(phase="Pending", initContainerStatuses=[{**status, "lastState": last}])


def test_an_init_container_that_keeps_failing_fails_the_step_with_its_log() -> None:
    # the states between two crashes
    states = ({"waiting": {"reason": "CrashLoopBackOff"}}, {"running": {}})
    record = Record(*((conditions("Created=True"), [crashing(x), pod("b")]) for x in states))
    record.logs["w-0 wait previous"] = ["2026-01-01T00:00:00Z no such host"]
    lines, error = follow(record)
    crash = "init container wait: Error, exit code 7; restarted (restarts so far: 4)"
    assert f"launcher: pod w-0 on node n1: {crash}" in lines
    cause = "init container wait: CrashLoopBackOff, exit code 7"
    assert f"{cause}\nlast lines of its log:\n  no such host" in error
    over = crashing({"terminated": {"exitCode": 0}})
    assert blocking_reason(over) is None and failure_reason(over).container == "wait"


def test_a_missing_permission_for_events_is_not_an_error() -> None:
    lines: list[str] = []
    made = cluster(lines)
    made.core.list_namespaced_event = answers(refused(403, "events is forbidden"))
    assert made.events("type=Warning") == [] and lines == []
