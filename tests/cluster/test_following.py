"""Following a training job without a cluster; API responses are stubbed."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client

from components.launcher import launch as launcher
from components.launcher.client import Timeouts
from components.launcher.follower import Follower
from components.launcher.templates import KINDS
from tests.cluster.conftest import use_clock
from tests.cluster.test_launcher import (
    LABELS,
    OWNER,
    TEMPLATES,
    UNSCHEDULABLE,
    conditions,
    ended,
    filled,
    pod,
    waiting,
)
from tests.helpers.cluster import arguments

PYTORCH = KINDS["pytorchjob"]
SHORT = Timeouts(
    poll=0.01, api=0.2, forbidden=0.1, operator=0.1, start=0.1, schedule=0.1, deletion=0.1
)


class Record:
    """Replaces JobClient: each poll returns the next (job, pods); the last one repeats."""

    def __init__(self, *looks: tuple[dict | None, list[dict]], there: dict | None = None) -> None:
        self.looks, self.there, self.asked = list(looks), there, []
        self.logs: dict[str, list[str]] = {}
        self.annotations: dict[str, str] = {}
        self.flicker: list[dict] = []
        self.warnings: list[dict] = []
        self.queued: list[dict] | None = None  # Kueue's Workloads
        self.forgotten: tuple[str, ...] = ()  # fields of spec that the cluster's definition lacks

    def create(self, job: dict, refused: float = 0) -> dict | None:
        self.asked.append("create")
        spec = {key: value for key, value in job["spec"].items() if key not in self.forgotten}
        return {**job, "spec": spec} if self.there is None else None

    def get(self) -> dict | None:
        if self.there is not None and self.asked[-1] == "create":
            return self.there
        job = self.looks[0][0]
        return None if job is None else {**filled(), **job}

    def adopt(self, owners: list[dict]) -> None:
        self.asked.append("adopt " + " ".join(owner["name"] for owner in owners))
        self.there = None

    def annotate(self, annotations: dict[str, str]) -> None:
        self.annotations |= annotations

    def mark(self, failure: str, spec: dict | None) -> None:
        self.asked.append("halt" if spec else "mark")
        self.spec = spec
        self.told = failure

    def delete(self) -> None:
        self.asked.append("delete")
        self.there = None

    def replace(self, job: dict, failure: str) -> None:
        self.asked.append("replace")
        self.replacement, self.told = job, failure

    def pods(self) -> tuple[list[dict], str]:
        return (self.looks.pop(0) if len(self.looks) > 1 else self.looks[0])[1], "1"

    def watch(self, version: str, seconds: float) -> list[dict]:
        shown, self.flicker = self.flicker, []
        return shown

    def events(self, selector: str) -> list[dict]:
        return self.warnings

    def workloads(self, uid: str) -> list[dict] | None:
        return self.queued

    def log(self, pod: str, container: str = "", tail: int | None = None, **more: Any) -> list[str]:
        pod = f"{pod} {container}" if container not in ("", "pytorch") else pod
        key = f"{pod} previous" if more.get("previous") else pod
        return self.logs.get(key, [])[-(tail or 10**9) :]


def follow(record: Record, job: dict | None = None, done: bool = False) -> tuple[list[str], str]:
    """Follow the job; return the logged lines and the error's text."""
    lines: list[str] = []
    if job is None:
        job = filled(owner=OWNER)
        del job["metadata"]["annotations"]  # the job file's timeout for nodes
    with pytest.MonkeyPatch.context() as patch:
        use_clock(patch)
        try:
            Follower(record, PYTORCH, job, lines.append, SHORT, lambda: done).run()
        except RuntimeError as error:
            return lines, str(error)
    return lines, ""


DONE, RUNNING = conditions("Succeeded=True", "Running=False"), conditions("Running=True")


def test_a_job_is_created_and_followed_to_its_end() -> None:
    record = Record((CREATED, []), *[(RUNNING, [pod()])] * 2, (DONE, [pod()]))
    record.logs["w-0"] = ["2026-01-01T00:00:00.1Z step 1", "2026-01-01T00:00:00.12Z step 2"]
    name = "PyTorchJob vitdet-tiny-1"
    lines, error = follow(record)
    assert error == "" and lines == [
        f"launcher: created {name} in namespace ours",
        *(f"launcher: {name}: {phase}" for phase in ("created", "running")),
        *("step 1", "step 2", f"launcher: {name}: succeeded"),
    ]
    assert record.asked == ["create"]


def test_a_retried_step_follows_its_job_and_renews_its_owner() -> None:
    record = Record((DONE, []), there={"metadata": {"labels": LABELS}, **RUNNING})
    lines, error = follow(record)
    assert not error and "following it" in lines[0] and record.asked == ["create", "adopt run"]


def test_a_job_of_an_earlier_attempt_that_is_being_deleted_is_recreated() -> None:
    for there in (conditions("Failed=True"), {"status": {}}):
        metadata = {"labels": LABELS, "deletionTimestamp": "2026-01-01T00:00:00Z"}
        record = Record((DONE, []), there={"metadata": metadata, **there})
        assert follow(record)[1] == "" and record.asked == ["create", "delete", "create"]


def test_a_job_of_another_run_is_not_changed() -> None:
    record = Record((DONE, []), there={"metadata": {"labels": {"vitdet/run": "other"}}, **RUNNING})
    assert "does not belong to this run" in follow(record)[1] and record.asked == ["create"]


def test_waiting_for_a_suspended_job_is_logged_once() -> None:
    held = (conditions("Created=True", "Suspended=True"), [])
    lines, error = follow(Record(*[held] * 30, (RUNNING, []), (DONE, [])))
    assert not error and sum("suspended until a queue (Kueue)" in line for line in lines) == 1


def test_a_failed_job_is_reported_with_its_cause_and_the_last_30_lines() -> None:
    failed = pod("m", container=ended(1, when="2026-01-01T00:00:09Z"))
    killed = pod("w", phase="Failed", container=ended(137, "OOMKilled"))
    job = conditions("Failed=True", message="1 Worker replica(s) failed.")
    record = Record((job, [failed, killed]))
    record.logs["w"] = [f"2026-01-01T00:00:{second:02}Z line {second}" for second in range(40)]
    _, error = follow(record)
    head, *tail = error.split("\n  ")
    assert head == (
        "PyTorchJob vitdet-tiny-1 failed: 1 Worker replica(s) failed.\n"
        "cause: pod w on node n1: OOMKilled, exit code 137 (SIGKILL)\nlast lines of its log:"
    )
    assert tail == [f"line {second}" for second in range(10, 40)]


def test_a_cause_seen_only_between_polls_is_remembered_with_its_log() -> None:
    record = Record((RUNNING, [pod()]), (conditions("Failed=True"), []))
    record.flicker = [pod(phase="Failed", reason="Evicted", message="low on memory")]
    record.logs["w-0"] = ["2026-01-01T00:00:00Z last words"]
    lines, error = follow(record)
    assert "Evicted: low on memory\nlast lines of its log:\n  last words" in error
    assert "launcher: pod w-0 on node n1: Evicted: low on memory" in lines


def test_a_process_killed_under_torchrun_is_reported_as_out_of_memory() -> None:
    record = Record((conditions("Failed=True"), [pod(phase="Failed", container=ended(1))]))
    line = "error_file: <N/A> traceback : Signal 9 (SIGKILL) received by PID 17"
    record.logs["w-0"] = [f"2026-01-01T00:00:00Z   {line}"]
    text = "exit code 1 (the system killed a process, most likely for lack of memory)"
    assert text in follow(record)[1]


def test_a_deleted_job_is_an_error_unless_its_training_is_complete() -> None:
    record = Record((RUNNING, [pod(container=ended(1, key="lastState"))]), (None, []))
    error = follow(record)[1]
    assert "was deleted before training was complete" in error
    assert "cause: pod w-0 on node n1: Error, exit code 1" in error
    # deleted after its time to live
    lines, error = follow(Record((RUNNING, []), (None, [])), done=True)
    assert error == "" and lines[-1].endswith("is gone, and its training is complete")


def test_a_job_that_failed_after_its_training_was_complete_has_succeeded() -> None:
    lines, error = follow(Record((conditions("Failed=True"), [pod(container=ended(1))])), done=True)
    assert error == "" and lines[-1].endswith("failed after its training was complete")


def test_an_expired_deadline_is_the_only_reported_cause() -> None:
    texts = {
        "Job j has failed because it was active longer than specified deadline": "PyTorchJobFailed",
        "TrainJob exceeded its active deadline": "DeadlineExceeded",
    }
    for message, reason in texts.items():
        job = conditions("Failed=True", message=message, reason=reason)
        _, error = follow(Record((job, [pod(container=ended(143))])))
        assert error == (
            f"PyTorchJob vitdet-tiny-1 failed: {message}\ncause: the deadline "
            "(activeDeadlineSeconds: 1209600 s); the checkpoints are kept"
        )


def unschedulable(name: str = "w-0") -> dict:
    return pod(name, "Pending", conditions=[UNSCHEDULABLE])


BAD_IMAGE = waiting(reason="ImagePullBackOff", message="no tag")
CREATED = conditions("Created=True")


@pytest.mark.parametrize(
    ("poll", "text"),
    [
        (({}, []), "has had no status for 0 s: the Kubeflow training operator (v1.9)"),
        ((CREATED, [unschedulable()]), "Unschedulable: 0/3 nodes are available: 3 Insufficient"),
        ((CREATED, [BAD_IMAGE]), "cause: pod w-0: ImagePullBackOff: no tag"),
    ],
)
def test_a_job_that_never_starts_is_suspended_and_reported(poll: tuple, text: str) -> None:
    record = Record(poll)
    lines, error = follow(record)
    assert text in error and error.endswith("the job is suspended")
    assert record.asked == ["create", "halt"]
    assert sum("waiting" in line for line in lines) == bool(
        poll[1]
    )  # logged once, before the error


def test_a_job_file_may_set_a_longer_timeout_for_nodes() -> None:
    job = filled()
    job["metadata"]["annotations"] = {"vitdet/schedule-seconds": "1000"}
    waiting = (CREATED, [unschedulable()])
    assert follow(Record(*[waiting] * 30, (DONE, [])), job)[1] == ""


def test_an_elastic_job_that_runs_does_not_need_all_its_nodes() -> None:
    job = filled()
    job["spec"]["elasticPolicy"] = {}
    partial = (RUNNING, [pod("w-1"), unschedulable()])
    assert follow(Record(*[partial] * 30, (DONE, [])), job)[1] == ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("reason", ["", "its run has been terminated"])
def test_a_stopped_step_deletes_its_job_if_its_run_ends(
    number: int, reason: str, ctrl_c: None
) -> None:
    class Stopped(Record):
        def pods(self) -> tuple[list[dict], str]:
            os.kill(os.getpid(), number)
            return super().pods()

    record, lines = Stopped((RUNNING, [])), []
    before = signal.getsignal(signal.SIGTERM)
    given = (record, PYTORCH, filled(owner=OWNER), lines.append, SHORT)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        Follower(*given, end_reason=lambda: reason).run()
    assert record.asked == (["create", "delete"] if reason else ["create"])
    assert signal.getsignal(signal.SIGTERM) is before
    text = " (its run has been terminated); deleting " if reason else ", but its run continues: "
    assert f"this step is being stopped{text}PyTorchJob vitdet-tiny-1" in lines[-1]


def test_invalid_arguments_are_rejected_before_a_job_is_created(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = {**arguments(TEMPLATES["pytorchjob"], []), "workspace": "/data/runs"}
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "none"))
    text = "no cluster: not in a pod with a service account, and no usable kubeconfig"
    with pytest.raises(RuntimeError, match=text):
        launcher.launch(**given)
    api = client.ApiClient(client.Configuration())
    monkeypatch.setattr(launcher, "connect", lambda retries=None: (api, "ours"))
    with pytest.raises(ValueError, match="one of pytorchjob, trainjob, got 'job'"):
        launcher.launch(**{**given, "kind": "job"})

    def refuse(count: int) -> None:
        raise ValueError(f"{count} processes cannot share a batch of 3")

    with pytest.raises(ValueError, match="^2 processes cannot share"):
        launcher.launch(**given, check_processes=refuse)
    text = "do not mount the workspace /database; they mount /data, /tmp, /dev/shm"
    with pytest.raises(ValueError, match=text):
        launcher.launch(**{**given, "workspace": "/database"})
