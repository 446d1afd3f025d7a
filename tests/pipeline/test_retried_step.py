"""Retried steps: transient errors are retried, permanent ones are reported again at once."""

from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from kubernetes import client
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import ReadTimeoutError

from components.launcher import client as kube
from components.launcher import launch as launcher
from components.launcher.client import JobClient
from components.launcher.follower import MAX_ANNOTATION, Follower
from components.launcher.status import retention
from components.launcher.templates import FAILURE, KINDS
from tests.cluster.test_following import BAD_IMAGE, DONE, PYTORCH, RUNNING, SHORT, Record, follow
from tests.cluster.test_launcher import LABELS, OWNER, TEMPLATES, conditions, ended, filled, pod
from tests.helpers.cluster import arguments

END = "2026-01-01T00:00:10Z"
FAILED = conditions("Failed=True", message="1 Worker replica failed.", lastTransitionTime=END)


def there(status: dict, told: str = "") -> dict:
    """Return a job of an earlier attempt, which may be annotated with its failure."""
    annotations = {"annotations": {FAILURE: told}} if told else {}
    return {"metadata": {"labels": LABELS, **annotations}, **status}


def test_the_failed_job_is_kept_and_annotated_with_the_cause() -> None:
    record = Record((FAILED, [pod("w", phase="Failed", container=ended(137, "OOMKilled"))]))
    record.logs["w"] = ["2026-01-01T00:00:00Z last words"]
    _, error = follow(record)
    assert record.asked == ["create", "mark"] and record.told == error
    assert "OOMKilled, exit code 137 (SIGKILL)\nlast lines of its log:\n  last words" in error


def test_a_retried_step_repeats_the_cause_without_training() -> None:
    told = "PyTorchJob vitdet-tiny-1 failed: 1 Worker replica failed.\ncause: pod w: OOMKilled"
    # the second job could not start
    for status in (FAILED, conditions("Created=True", "Suspended=True")):
        record = Record((DONE, []), there=there(status, told))
        lines, error = follow(record)
        assert error == told and record.asked == ["create", "adopt run"]
        assert lines == [
            "launcher: PyTorchJob vitdet-tiny-1 exists from an earlier attempt of this step: "
            "it has failed and is not recreated"
        ]


def test_a_job_that_failed_between_two_attempts_is_explained_by_the_second() -> None:
    record = Record((FAILED, [pod("w", phase="Failed", container=ended(1))]), there=there(FAILED))
    record.logs["w"] = ["2026-01-01T00:00:00Z ValueError: no such image"]
    _, error = follow(record)
    assert record.asked == ["create", "adopt run", "mark"]
    cause = "cause: pod w on node n1: Error, exit code 1"
    assert error.endswith(f"{cause}\nlast lines of its log:\n  ValueError: no such image")


@pytest.mark.parametrize("told", ["", "PyTorchJob vitdet-tiny-1 failed: no quota"])
def test_a_run_retried_by_the_user_trains_again(told: str) -> None:
    """Kubeflow then deletes the failed steps' pods, and thereby the job; the test covers the time before that."""
    record = Record((DONE, []), there=there(FAILED, told))
    Follower(record, PYTORCH, filled(owner=OWNER), lambda _: None, SHORT, first_attempt=True).run()
    assert record.asked == ["create", "delete", "create"]


def test_the_first_pod_of_a_step_is_recognized(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Noted(Follower):
        def run(self) -> None:
            seen.append(self.first_attempt)

    monkeypatch.setattr(launcher, "Follower", Noted)
    api = client.ApiClient(client.Configuration())
    monkeypatch.setattr(launcher, "connect", lambda retries=None: (api, "ours"))
    for index in ("0", "1", None):
        monkeypatch.setenv("KFP_RETRY_INDEX", index) if index else monkeypatch.delenv(
            "KFP_RETRY_INDEX"
        )
        launcher.launch(**arguments(TEMPLATES["pytorchjob"], []))
    assert seen == [True, False, False]


def test_a_job_that_a_queue_would_resume_is_replaced_by_a_suspended_job() -> None:
    job = filled(owner=OWNER)
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "vitdet"
    record = Record(({"metadata": job["metadata"], **conditions("Created=True")}, [BAD_IMAGE]))
    _, error = follow(record, job)
    assert error.endswith("ImagePullBackOff: no tag; the job is suspended")
    assert record.asked == ["create", "replace"]
    kept = record.replacement["metadata"]
    assert record.told == error and kept["ownerReferences"] == [OWNER]
    assert kept["labels"]["kueue.x-k8s.io/queue-name"] == "vitdet-none"


def test_a_job_in_a_queue_that_cannot_be_replaced_is_reported() -> None:
    class Stuck(Record):
        def replace(self, job: dict, failure: str) -> None:
            raise RuntimeError("the job is still being deleted; check its finalizers")

    job = filled(owner=OWNER)
    job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] = "vitdet"
    look = ({"metadata": job["metadata"], **conditions("Created=True")}, [BAD_IMAGE])
    lines, error = follow(Stuck(look), job)
    assert "ImagePullBackOff" in error and "the job is still being deleted" in lines[-1]


def test_a_job_that_cannot_be_ended_otherwise_is_deleted() -> None:
    class Refusing(Record):
        def mark(self, failure: str, spec: dict | None) -> None:
            raise RuntimeError("spec is immutable")

    record = Refusing((conditions("Created=True"), [BAD_IMAGE]))
    assert "ImagePullBackOff" in follow(record)[1] and record.asked == ["create", "delete"]

    class Away(Refusing):
        def delete(self) -> None:
            raise RuntimeError("the API server does not respond")

    lines, error = follow(Away((conditions("Created=True"), [BAD_IMAGE])))
    assert "ImagePullBackOff" in error and "which may still use its GPUs" in lines[-1]


def test_a_failed_annotation_does_not_hide_the_cause() -> None:
    class Mute(Record):
        def mark(self, failure: str, spec: dict | None) -> None:
            raise RuntimeError("cannot patch pytorchjobs")

    lines, error = follow(Mute((FAILED, [])))
    assert error == "PyTorchJob vitdet-tiny-1 failed: 1 Worker replica failed."
    assert lines[-1] == "launcher: cannot annotate the job with the cause: cannot patch pytorchjobs"


def test_long_log_lines_are_truncated_in_the_annotation_only() -> None:
    record = Record((FAILED, [pod("w", phase="Failed", container=ended(1))]))
    record.logs["w"] = ["2026-01-01T00:00:00Z " + "x" * 300_000]
    _, error = follow(record)
    assert len(error) > 300_000 and len(record.told) == MAX_ANNOTATION


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("pytorchjob", {"runPolicy": {"suspend": True}}), ("trainjob", {"suspend": True})],
)
def test_a_failure_is_annotated_and_may_halt_the_job(kind: str, spec: dict) -> None:
    sent = []
    api = client.ApiClient(client.Configuration())
    cluster = JobClient(api, KINDS[kind], "j", "ours", print, SHORT)

    def patch(*given: object, **_: object) -> object:
        sent.append(given[-1])
        return type("Raw", (), {"data": b"{}"})

    cluster.objects.patch_namespaced_custom_object = patch
    cluster.mark("why", None)
    cluster.mark("why", KINDS[kind].halt)
    metadata = {"annotations": {"vitdet/failure": "why"}}
    assert sent == [{"metadata": metadata}, {"metadata": metadata, "spec": spec}]


class Objects:
    """CustomObjectsApi with these jobs; exceptions are raised when their kind is listed or their job is deleted."""

    def __init__(self, pytorchjobs: object, trainjobs: object = (), **deletions: Exception) -> None:
        self.jobs = {"pytorchjobs": pytorchjobs, "trainjobs": trainjobs}
        self.deletions, self.deleted = deletions, []

    def list_namespaced_custom_object(self, *words: str, label_selector: str, **_: object) -> dict:
        assert label_selector == "vitdet/run=run-1" and words[2] == "ours"
        found = self.jobs[words[3]]
        if isinstance(found, Exception):
            raise found
        return {"items": found}

    def delete_namespaced_custom_object(self, *words: str, **_: object) -> dict:
        *_, plural, name = words
        if name in self.deletions:
            raise self.deletions[name]
        self.deleted.append(f"{plural}/{name}")
        return {}


def named(name: str, status: dict, **spec: object) -> dict:
    return {"metadata": {"name": name, "ownerReferences": [OWNER]}, "spec": spec, **status}


def delete(
    objects: Objects, monkeypatch: pytest.MonkeyPatch, own: str = ""
) -> tuple[list[str], list[str]]:
    monkeypatch.setattr(launcher, "connect", lambda retries=None: (None, "ours"))
    monkeypatch.setattr(kube.client, "CustomObjectsApi", lambda _: objects)
    return launcher.delete_jobs("run-1", own=own)


def test_running_jobs_are_deleted_and_ended_jobs_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = [
        named("runs", RUNNING),
        named("failed", FAILED, runPolicy={"ttlSecondsAfterFinished": 3600}),
        named("suspended", conditions("Suspended=True", "Running=False")),
        named("new", {}),
    ]
    objects = Objects(jobs, [named("done", conditions("Complete=True"))])
    deleted, left = delete(objects, monkeypatch)
    assert deleted == ["runs", "suspended", "new"]
    assert objects.deleted == [f"pytorchjobs/{name}" for name in deleted]
    until = "kept, with the logs of the remaining pods, until"
    assert left == [
        f"failed: failed; {until} 2026-01-01 01:00 UTC or its run is deleted",
        f"done: succeeded; {until} its run is deleted",
    ]


def test_a_job_that_is_being_deleted_is_reported_and_not_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    going = named("going", RUNNING)
    going["metadata"]["deletionTimestamp"] = END  # a finalizer keeps it, e.g. Kueue's
    objects = Objects([going])
    assert delete(objects, monkeypatch) == ([], ["going: already being deleted"])
    assert objects.deleted == []


def test_a_missing_job_or_kind_does_not_prevent_other_deletions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = ApiException(status=404)
    objects = Objects([named("gone", RUNNING), named("runs", RUNNING)], absent, gone=absent)
    assert delete(objects, monkeypatch) == (["gone", "runs"], [])
    assert objects.deleted == ["pytorchjobs/runs"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ApiException(status=403), "cannot (list|delete) pytorchjobs in namespace ours"),
        (ReadTimeoutError(None, "/", "x"), "the API server does not respond .ReadTimeoutError."),
    ],
)
def test_a_failed_deletion_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: Exception, text: str
) -> None:
    if isinstance(error, ApiException):
        error.body = json.dumps({"message": "jobs is forbidden"})
    for objects in (Objects(error, error), Objects([named("runs", RUNNING)], runs=error)):
        with pytest.raises((RuntimeError, PermissionError), match=text) as raised:
            delete(objects, monkeypatch)
        assert "\n" not in str(raised.value)


def test_a_forbidden_kind_does_not_prevent_deletions_of_the_other_kind(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = ApiException(status=403, reason="Forbidden")
    error.body = json.dumps({"message": "trainjobs is forbidden"})
    objects = Objects([named("runs", RUNNING)], error)
    deleted, (left,) = delete(objects, monkeypatch, "pytorchjob")
    assert deleted == ["runs"] and objects.deleted == ["pytorchjobs/runs"]
    text = "trainjobs could not be listed: cannot list trainjobs in namespace ours: trainjobs is"
    assert left.startswith(f"{text} forbidden")
    # the run's own kind is forbidden, so jobs may remain
    with pytest.raises(
        PermissionError, match="trainjobs is forbidden.*; jobs deleted before this error: runs$"
    ):
        delete(objects, monkeypatch, "TrainJob")


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (None, "namespace team-a of the cluster of context work"),
        # the account may have permissions for jobs only
        (ApiException(status=403), "namespace team-a of the cluster of context work"),
        (ApiException(status=404), "the cluster of context work has no namespace team-a; pass"),
        (ReadTimeoutError(None, "/", "x"), "the cluster of context work does not respond (Read"),
    ],
)
def test_the_namespace_is_described(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: Exception | None, told: str
) -> None:
    def read_namespace(_: object, name: str, _request_timeout: tuple) -> None:
        assert name == "team-a"
        if answer is not None:
            raise answer

    monkeypatch.setattr(kube.client.CoreV1Api, "read_namespace", read_namespace)
    kubeconfig = {
        "current-context": "work",
        "contexts": [{"name": "work", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "http://127.0.0.1:1"}}],
        "users": [{"name": "u", "user": {}}],
    }
    (tmp_path / "kubeconfig").write_text(json.dumps(kubeconfig))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    try:
        found = kube.describe_namespace("team-a")
    except (ValueError, RuntimeError) as error:
        found = str(error)
    assert found.startswith(told)
    monkeypatch.delenv("KUBECONFIG")
    monkeypatch.setattr(kube, "SERVICE_ACCOUNT", tmp_path)
    monkeypatch.setattr(kube.config, "load_incluster_config", lambda **_: None)
    (tmp_path / "namespace").write_text("team-a")
    if answer is None:
        assert kube.describe_namespace("team-a") == "namespace team-a of this pod's cluster"


def test_the_time_to_live_starts_at_the_end_of_a_job() -> None:
    status = {"status": {**DONE["status"], "completionTime": "2026-03-01T10:00:00Z"}}
    spec = {"runPolicy": {"ttlSecondsAfterFinished": 86400}}
    job = {"metadata": {"name": "j"}, "spec": spec, **status}
    assert retention(PYTORCH, job).endswith("until 2026-03-02 10:00 UTC")
    del job["spec"]["runPolicy"]
    assert retention(PYTORCH, job).endswith("until it is deleted manually")
    assert retention(PYTORCH, {**job, **RUNNING}) == ""
    # Python 3.11 parses Kubernetes' times
    assert datetime.fromisoformat("2026-03-01T10:00:00Z") + timedelta(days=1)
