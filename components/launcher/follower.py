"""Follow one job to its end: forward its log, detect why it fails or does not start.

The job is polled every few seconds rather than watched: a poll needs no state that a dropped
connection or a restarted API server could lose. Between two polls the pods are watched, so that
no cause of a failure is missed: the operator replaces a killed pod at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

from components.launcher.client import JobClient, Timeouts
from components.launcher.failures import Failures
from components.launcher.logs import PodLog, RankLogs
from components.launcher.progress import PROGRESS, Progress
from components.launcher.pruned import check_dropped
from components.launcher.queue import (
    is_suspended,
    no_workload,
    queue_name,
    waiting_reason,
    without_queue,
)
from components.launcher.restarts import Restarts, node_is_unresponsive
from components.launcher.signals import on_stop
from components.launcher.status import (
    BROKEN,
    Cause,
    annotations_of,
    blocking_reason,
    creation_time,
    deadline_exceeded,
    expected_pods,
    failure_reason,
    job_phase,
    missing_pods,
    restart_count,
    startup_warning,
)
from components.launcher.templates import ERRORS, FAILURE, RESTARTS, SCHEDULE, STARTED, Kind
from components.launcher.workflow import without_run

MAX_ANNOTATION = 32_000  # maximum number of characters of the annotation FAILURE
NO_WORKLOAD = 30.0  # seconds within which Kueue should create a job's Workload


class Follower:
    """One job, from its creation to its end.

    Failed jobs are kept and annotated with the cause; a retried step raises this cause instead of
    training again.

    finished: returns whether training is complete; called if the job is gone or has failed.
    end_reason: called if this process is stopped; returns why the job must end, "" to keep the job.
    first_attempt: whether this is the first attempt of the step since the user started or retried
    the run; the first attempt recreates an existing failed job.
    keep_logs: called at the end with a dictionary: file name -> last lines of a rank or pod.
    """

    def __init__(
        self,
        client: JobClient,
        kind: Kind,
        job: dict,
        out: Callable[[str], None],
        timeouts: Timeouts,
        finished: Callable[[], bool] = lambda: False,
        end_reason: Callable[[], str] = lambda: "",
        first_attempt: bool = False,
        keep_logs: Callable[[dict[str, str]], None] = lambda files: None,
    ) -> None:
        self.client, self.kind, self.job, self.out = client, kind, job, out
        self.timeouts, self.finished, self.end_reason = timeouts, finished, end_reason
        self.first_attempt, self.keep_logs = first_attempt, keep_logs
        self.current = job  # the job as last returned by the API server
        self.name = f"{kind.name} {job['metadata']['name']}"
        self.reported: dict[str, str] = {}
        self.since: dict[str, float] = {}
        self.pods: list[dict] = []  # the pods at the last poll
        self.pod_logs: dict[str, PodLog] = {}
        self.ranks, self.progress = RankLogs(), Progress()
        self.failures = Failures(client, self.ranks)
        self.restarts, self.errors, self.started = Restarts(), 0, False
        self.admitted = False  # by Kueue
        schedule = float(annotations_of(job).get(SCHEDULE) or timeouts.schedule)
        self.limits = {"schedule": schedule, "start": timeouts.start}

    def run(self) -> None:
        """Block until the job has succeeded. Raises RuntimeError with the cause of a failure."""
        try:
            with on_stop(self.stopped):
                self.create_or_adopt()
                while not self.poll():
                    pass
        except RuntimeError:
            for source, lines in self.ranks.tails().items():
                self.out(f"launcher: last lines of {source}:")
                for line in lines:
                    self.out(f"  {line}")
            self.keep_logs(self.ranks.files())
            raise
        self.keep_logs(self.ranks.files())

    def stopped(self) -> None:
        """Delete the job if its pipeline run is ending; else keep it for the step's next attempt.

        The run continues if, for example, only the step's pod is evicted.
        """
        stopping = "launcher: this step is being stopped"
        if reason := self.end_reason():
            self.out(f"{stopping} ({reason}); deleting {self.name}")
            self.client.delete()
        else:
            self.out(
                f"{stopping}, but its run continues: {self.name} is kept, and the next attempt "
                "of the step follows it"
            )

    def report(self, topic: str, text: str) -> None:
        """Write `text` to the step's log unless it is empty or repeats the topic's last text."""
        if text and self.reported.get(topic) != text:
            self.out(f"launcher: {text}")
        self.reported[topic] = text

    def persists(self, topic: str, holds: bool, limit: float) -> bool:
        """Return whether the topic's condition `holds` has been true for at least `limit` s."""
        if not holds:
            self.since.pop(topic, None)
            return False
        return time.monotonic() - self.since.setdefault(topic, time.monotonic()) >= limit

    def create_or_adopt(self) -> None:
        """Create the job, or follow the job that an earlier attempt of this step created."""
        wanted = self.job["metadata"]
        while (created := self.client.create(self.job, self.limits["schedule"])) is None:
            existing = self.client.get()
            if existing is None:
                continue
            labels = existing["metadata"].get("labels") or {}
            own = {k: v for k, v in wanted["labels"].items() if k.startswith("vitdet/")}
            if not own.items() <= labels.items():
                raise RuntimeError(
                    f"{self.name} exists and does not belong to this run: its labels are {labels}"
                )
            failure = annotations_of(existing).get(FAILURE, "")
            failed = failure or job_phase(self.kind, existing)[0] == "failed"
            outdated = self.first_attempt and failed
            if not outdated and "deletionTimestamp" not in existing["metadata"]:
                self.adopt(existing, failure)
                return
            earlier = f"{self.name} of an earlier attempt"
            self.report("created", f"{earlier} has failed or is being deleted: recreating it")
            if self.persists("deletion", True, self.timeouts.deletion):
                raise RuntimeError(f"{earlier} is still being deleted; check its finalizers")
            self.client.delete()
            time.sleep(min(self.timeouts.poll, 1))
        self.report("created", f"created {self.name} in namespace {wanted['namespace']}")
        warnings, error = check_dropped(self.kind, self.job, created)
        for text in warnings:
            self.report(text, text)
        if error:
            self.delete_failed()
            raise RuntimeError(f"{self.name} was deleted: {error}")

    def adopt(self, existing: dict, failure: str) -> None:
        """Take over an earlier attempt's job; raises RuntimeError if `failure` is not empty."""
        meaning = "it has failed and is not recreated" if failure else "following it"
        self.report(
            "created", f"{self.name} exists from an earlier attempt of this step: {meaning}"
        )
        owners = self.job["metadata"].get("ownerReferences") or []
        if owners:  # an exit handler removes the run from the owners of a job that outlives the run
            self.client.adopt([*without_run(existing), *owners])
        if failure:
            raise RuntimeError(failure)
        annotations = annotations_of(existing)
        self.errors = int(annotations.get(ERRORS, 0))
        self.restarts = Restarts(self.errors)
        self.started = STARTED in annotations

    def poll(self) -> bool:
        """Report changes; return whether training is complete. Raises RuntimeError on failure."""
        job = self.client.get()
        if job is None:
            return self.handle_missing()
        self.current, (phase, message) = job, job_phase(self.kind, job)
        pods, version = self.client.pods()
        # pods of a deleted job with this name may still exist for a moment
        pods = [pod for pod in pods if creation_time(pod) >= creation_time(job)]
        ended = phase in ("succeeded", "failed")
        meaning = phase
        if phase == "suspended":
            meaning = "suspended until a queue (Kueue) or a user resumes it; waiting"
        details = f" ({message})" if message else ""
        self.report("phase", f"{self.name}: {meaning}{details}" if phase else "")
        self.pods = pods
        self.read_logs(final=ended)
        self.record_failures(pods)
        self.publish_progress(final=ended)
        if phase == "succeeded":
            return True
        if phase == "failed" and self.finished():  # e.g. a pod was lost after training ended
            self.report("complete", f"{self.name} failed after its training was complete")
            return True
        if phase == "failed":
            # after the deadline the operator deletes the pods, which makes them fail as well
            deadline = deadline_exceeded(job, message)
            cause = f"\ncause: {deadline}; the checkpoints are kept" if deadline else ""
            why = cause or self.failures.explain(pods, None)
            self.fail(f"{self.name} failed: {message or 'its status has no message'}{why}", None)
        if phase == "suspended":
            self.restarts.forget_pods()
        else:
            self.count_failures()
        self.check_queue(job, phase)
        limit = self.timeouts.operator
        missing = None if phase == "suspended" else missing_pods(job, pods, self.client.events)
        if self.persists("operator", not phase and not pods and not missing, limit):
            text = f"has had no status for {limit:.0f} s: {self.kind.operator} is not running"
            self.give_up(f"{self.name} {text}")
        self.check_start(phase, missing)
        until = time.monotonic() + self.timeouts.poll
        for pod in self.client.watch(version, self.timeouts.poll):
            self.record_failures([pod])
            if phase != "suspended":
                self.restarts.observe(pod, self.kind.container, time.monotonic())
        time.sleep(max(0.0, until - time.monotonic()))
        return False

    def read_logs(self, final: bool) -> None:
        """Read the new lines of all pods whose node responds; final: whether the job has ended."""
        present = {pod["metadata"]["uid"] for pod in self.pods}
        self.pod_logs = {uid: log for uid, log in self.pod_logs.items() if uid in present}
        for pod in self.pods:
            if node_is_unresponsive(pod):  # a request for its log would time out
                name, node = pod["metadata"]["name"], (pod.get("spec") or {}).get("nodeName")
                ending = (
                    "the pod is replaced after its eviction, or after the Node object is deleted"
                )
                self.report(name, f"pod {name}: its node {node} does not respond; {ending}")
            else:
                self.stream_log(pod, final)

    def check_queue(self, job: dict, phase: str) -> None:
        """Report why Kueue does not admit the job; give up if a suspended job has no Workload."""
        queue = queue_name(job)
        if not queue or (self.admitted and phase != "suspended"):
            return
        workloads = self.client.workloads(job["metadata"].get("uid", ""))
        if workloads is None:
            return
        reasons = [reason for workload in workloads if (reason := waiting_reason(workload))]
        self.admitted = bool(workloads) and not reasons
        if workloads:
            waiting = f"{self.name} is waiting in Kueue: {reasons[0]}" if reasons else ""
            self.report("queue", waiting)
        text, limit = no_workload(self.kind, queue), self.timeouts.operator
        if self.persists("no Workload", not workloads, min(NO_WORKLOAD, limit)):
            self.report("queue", f"{self.name}: {text}")
            self.admitted = not is_suspended(job)  # a job that is not suspended runs without Kueue
        if self.persists("unknown to Kueue", not workloads and is_suspended(job), limit):
            self.give_up(f"{self.name} has been suspended for {limit:.0f} s: {text}")

    def publish_progress(self, final: bool) -> None:
        """Annotate the job with the step, the speed and the expected end of its training run."""
        if value := self.progress.due(time.monotonic(), final):
            try:
                self.client.annotate({PROGRESS: value})
            except RuntimeError as error:
                self.report("progress", f"cannot annotate {self.name} with its progress: {error}")

    def handle_missing(self) -> bool:
        """Return True if the deleted job had completed its training, else raise RuntimeError."""
        self.stream_held_lines()
        if self.finished():
            self.report("phase", f"{self.name} is gone, and its training is complete")
            return True
        raise RuntimeError(
            f"{self.name} was deleted before training was complete: by another client, with its "
            f"owner, or after a failure (ttlSecondsAfterFinished){self.failures.explain([], None)}"
        )

    def record_failures(self, pods: list[dict]) -> None:
        """Report failed pods and store the ends of their logs, as the pods may be deleted soon."""
        for pod in pods:
            cause = failure_reason(pod)
            if cause is None:
                continue
            container = cause.container or self.kind.container
            count = restart_count(pod, container)
            again = f"; restarted (restarts so far: {count})" if cause.previous else ""
            if f"{cause}{again}" != self.reported.get(cause.pod):
                self.report(cause.pod, f"{cause}{again}")
                self.stream_log(pod)
                self.failures.add(cause, container)

    def stream_log(self, pod: dict, final: bool = False) -> None:
        """Read a pod's new log lines and write rank 0's. final: whether the job has ended."""
        metadata = pod["metadata"]
        log = self.pod_logs.setdefault(metadata["uid"], PodLog(self.client, self.kind.container))
        main = self.kind.rank0(self.current).items() <= (metadata.get("labels") or {}).items()
        for line in self.ranks.add(metadata["name"], log.new_lines(pod, final), main):
            self.out(line)
            self.progress.read(line)

    def stream_held_lines(self) -> None:
        """Read the lines that are still held back when the job ends (see `logs.HOLD_SECONDS`)."""
        for pod in self.pods:
            log = self.pod_logs.get(pod["metadata"]["uid"])
            if log is not None and log.held_since is not None:
                self.stream_log(pod, final=True)

    def count_failures(self) -> None:
        """End the job if it ran out of memory or has had more errors than allowed restarts.

        Disruptions are not limited. The errors of a TrainJob are limited by its runtime instead.
        """
        now = time.monotonic()
        for pod in self.pods:
            self.restarts.observe(pod, self.kind.container, now)
        elastic = self.job["spec"].get("elasticPolicy") or {}
        needed = elastic.get("minReplicas", expected_pods(self.job))
        self.restarts.complete_poll(self.pods, needed, now)
        if count := self.restarts.disruptions:
            self.report("disruptions", f"disruptions so far, not counted as errors: {count}")
        if found := self.failures.out_of_memory():
            cause, advice = found
            self.give_up(f"{self.name} ran out of memory: {advice}", cause)
        allowed = annotations_of(self.job).get(RESTARTS)
        if allowed is None:
            return
        limit, errors = int(allowed), self.restarts.decided_errors(now)
        if errors != self.errors:
            self.errors = errors
            self.client.annotate({ERRORS: str(errors)})
            if errors <= limit:
                last = "; the next error ends the job" if errors == limit else ""
                self.report("errors", f"errors: {errors} of at most {limit}{last}")
        if errors > limit:
            self.give_up(f"{self.name} has failed (errors: {errors}, allowed restarts: {limit})")

    def check_start(self, phase: str, missing: Cause | None) -> None:
        """Report why pods do not start; give up if the problem persists.

        A job that has started waits until its deadline for the replacement of a lost node.
        """
        running = sum((pod.get("status") or {}).get("phase") == "Running" for pod in self.pods)
        if not self.started and running >= expected_pods(self.job):
            self.started = True
            self.client.annotate({STARTED: "true"})
        events = self.client.events
        found = [blocking_reason(pod) or startup_warning(pod, events) for pod in self.pods]
        # an elastic job can run with fewer nodes than requested
        elastic = "elasticPolicy" in self.job["spec"] and phase == "running"
        waiting = (
            f"{self.name} lost a pod; waiting for a replacement" if self.started else "waiting"
        )
        for topic in ("schedule", "start"):
            causes = [
                cause
                for cause in (*found, missing)
                if cause and (cause.reason in BROKEN) == (topic == "start")
            ]
            self.report(topic, f"{waiting}: {causes[0]}" if causes else "")
            # once the job has started, its image name is known to be correct: allow more time
            limit = self.limits["schedule" if self.started else topic]
            if self.started and topic == "schedule":
                continue
            if self.persists(topic, bool(causes) and not elastic, limit):
                self.give_up(f"{self.name} has not been able to start for {limit:.0f} s", causes[0])

    def give_up(self, text: str, cause: Cause | None = None) -> NoReturn:
        """Stop the job, keep it with the cause as an annotation, and raise RuntimeError."""
        self.stream_held_lines()
        explained = self.failures.explain(self.pods, cause)
        self.fail(f"{text}{explained}; the job is suspended", self.kind.halt)

    def fail(self, text: str, spec: dict | None) -> NoReturn:
        """Annotate the job with the cause and raise RuntimeError. spec: see `JobClient.mark`."""
        failure = text[:MAX_ANNOTATION]
        try:
            if spec and queue_name(self.current):  # Kueue would resume the suspended job
                self.client.replace(without_queue(self.job), failure)
            else:
                self.client.mark(failure, spec)
        except RuntimeError as error:
            self.out(f"launcher: cannot annotate the job with the cause: {error}")
            if spec:
                self.delete_failed()
        raise RuntimeError(text)

    def delete_failed(self) -> None:
        """Delete a failed job; report errors without raising them."""
        try:
            self.client.delete()
        except RuntimeError as error:
            self.out(f"launcher: cannot delete {self.name}, which may still use its GPUs: {error}")
