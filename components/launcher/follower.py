"""Follow one job to its end: forward its log, detect why it does not start or fails.

The job is polled every few seconds rather than watched: a poll needs no state that a dropped
connection or a restarted API server could lose. Between two polls the pods are watched, so that a
short-lived cause is not missed: the operator replaces a killed pod at once.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from components.launcher.client import JobClient, Timeouts
from components.launcher.status import (
    BROKEN,
    Cause,
    blocking_reason,
    deadline_exceeded,
    failure_reason,
    job_phase,
    missing_pods,
    restart_count,
    root_cause,
    startup_warning,
)
from components.launcher.templates import FAILURE, SCHEDULE, Kind

MAX_ANNOTATION = 32_000  # characters of FAILURE; the API server allows 256 KiB of annotations
# label of a job whose suspension is managed by Kueue
QUEUE = "kueue.x-k8s.io/queue-name"
TAIL_LINES = 30  # log lines of a failed pod
MAX_FIRST_LINES = 1000  # log lines of an existing job


class PodLog:
    """A pod's log; returns each line once, also if the container or the API server restarts."""

    def __init__(self, client: JobClient, container: str) -> None:
        self.client, self.container = client, container
        self.last_time, self.last_read, self.restarts = "", 0.0, 0

    def new_lines(self, pod: dict) -> list[str]:
        """Return the lines since the last call."""
        name, restarts = pod["metadata"]["name"], restart_count(pod, self.container)
        since = round(time.monotonic() - self.last_read) + 2 if self.last_read else None
        start = time.monotonic()
        lines: list[str] = []
        if restarts != self.restarts and self.last_read:
            lines += self.client.log(name, since=since, previous=True)
        lines += self.client.log(name, since=since, tail=None if since else MAX_FIRST_LINES)
        self.restarts = restarts
        new = []
        for when, _, text in (line.partition(" ") for line in lines):
            if comparable_time(when) > self.last_time:
                new.append(text)
                self.last_time = comparable_time(when)
        if lines:
            self.last_read = start
        return new


def comparable_time(text: str) -> str:
    """Pad the fraction of an RFC 3339 time to nine digits: trailing zeros may be omitted."""
    whole, _, fraction = text.removesuffix("Z").partition(".")
    return f"{whole}.{fraction:0<9}"


class Follower:
    """One job, from its creation to its end.

    Failed jobs are kept and annotated with the cause; a retried step re-raises it instead of
    training again.

    finished: returns whether the training is complete; called if the job is gone or has failed.
    first_attempt: this is not a retry, so an existing failed job is left over from before the user
    restarted the run.
    """

    def __init__(
        self,
        client: JobClient,
        kind: Kind,
        job: dict,
        out: Callable[[str], None],
        timeouts: Timeouts,
        finished: Callable[[], bool] = lambda: False,
        first_attempt: bool = False,
    ) -> None:
        self.client, self.kind, self.job, self.out = client, kind, job, out
        self.timeouts, self.finished, self.first_attempt = timeouts, finished, first_attempt
        self.current = job  # as last returned by the API server
        self.name = f"{kind.name} {job['metadata']['name']}"
        self.reported: dict[str, str] = {}
        self.since: dict[str, float] = {}
        self.failures: dict[str, tuple[Cause, list[str]]] = {}  # by pod: cause, end of its log
        self.logs: dict[str, PodLog] = {}
        self.limits = {"schedule": timeouts.schedule, "start": timeouts.start}
        own = (job["metadata"].get("annotations") or {}).get(SCHEDULE)
        if own:
            self.limits["schedule"] = float(own)

    def run(self) -> None:
        """Block until the job has succeeded. Raises RuntimeError with the cause of a failure."""
        with self.deleted_on_signal():
            self.create_or_adopt()
            while not self.poll():
                pass

    @contextmanager
    def deleted_on_signal(self) -> Iterator[None]:
        """Delete the job on SIGTERM (Kubernetes sends SIGKILL 30 s later) and on Ctrl-C."""

        def stop(number: int, frame: object) -> None:
            raise SystemExit(128 + number)

        # signal handlers can be set in the main thread only
        main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGTERM, stop) if main else None
        try:
            yield
        except (SystemExit, KeyboardInterrupt):
            if main:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.out(f"launcher: this step is being stopped: {self.name} is deleted")
            self.client.delete()
            raise
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)

    def report(self, topic: str, text: str) -> None:
        """Write `text` to the step's log unless it was the last one of this topic."""
        if text and self.reported.get(topic) != text:
            self.out(f"launcher: {text}")
        self.reported[topic] = text

    def persists(self, topic: str, holds: bool, limit: float) -> bool:
        """Whether a condition has held continuously for `limit` seconds."""
        if not holds:
            self.since.pop(topic, None)
            return False
        return time.monotonic() - self.since.setdefault(topic, time.monotonic()) >= limit

    def create_or_adopt(self) -> None:
        """Create the job, or follow the one that an earlier attempt of this step created."""
        wanted = self.job["metadata"]
        while not self.client.create(self.job):
            existing = self.client.get()
            if existing is None:
                continue
            labels = existing["metadata"].get("labels") or {}
            if any(
                labels.get(key) != value
                for key, value in wanted["labels"].items()
                if key.startswith("vitdet/")
            ):
                raise RuntimeError(
                    f"{self.name} exists and is not of this run: its labels are {labels}"
                )
            failure = (existing["metadata"].get("annotations") or {}).get(FAILURE, "")
            failed = failure or job_phase(self.kind, existing)[0] == "failed"
            outdated = self.first_attempt and failed
            if not outdated and "deletionTimestamp" not in existing["metadata"]:
                self.adopt(failure)
                return
            self.report(
                "created",
                f"{self.name} of an earlier attempt has failed or is being deleted: recreating it",
            )
            if self.persists("deletion", True, self.timeouts.deletion):
                raise RuntimeError(
                    f"{self.name} of an earlier attempt is still being deleted; check its finalizers"
                )
            self.client.delete()
            time.sleep(min(self.timeouts.poll, 1))
        self.report("created", f"created {self.name} in namespace {wanted['namespace']}")

    def adopt(self, failure: str) -> None:
        """Become the owner of an earlier attempt's job. Raises RuntimeError with its failure."""
        meaning = "it has failed and is not recreated" if failure else "following it"
        self.report(
            "created", f"{self.name} exists from an earlier attempt of this step: {meaning}"
        )
        owners = self.job["metadata"].get("ownerReferences")
        if owners:  # deleting the pod of the earlier attempt would delete the job
            self.client.adopt(owners[0])
        if failure:
            raise RuntimeError(failure)

    def poll(self) -> bool:
        """Report changes; return whether the job has succeeded. Raises RuntimeError if it failed."""
        job = self.client.get()
        if job is None:
            return self.handle_missing()
        self.current, (phase, message) = job, job_phase(self.kind, job)
        pods, version = self.client.pods()
        self.record_failures(pods)
        meaning = phase
        if phase == "suspended":
            meaning = "suspended, a queue (Kueue) or a user must resume it; waiting"
        details = f" ({message})" if message else ""
        self.report("phase", f"{self.name}: {meaning}{details}" if phase else "")
        self.stream_logs(job, pods)
        if phase == "succeeded":
            return True
        if phase == "failed" and self.finished():  # deadline exceeded, or a pod was lost at the end
            self.report("complete", f"{self.name} failed after its training was complete")
            return True
        if phase == "failed":
            # after the deadline the operator deletes the pods, so they fail too
            deadline = deadline_exceeded(job, message)
            why = (
                f"\ncause: {deadline}; its checkpoints stay"
                if deadline
                else self.explain(pods, None)
            )
            self.fail(f"{self.name} failed: {message or 'its status has no message'}{why}", False)
        limit = self.timeouts.operator
        missing = None if phase == "suspended" else missing_pods(job, pods, self.client.events)
        if self.persists("operator", not phase and not pods and not missing, limit):
            self.give_up(
                f"{self.name} has had no status for {limit:.0f} s: {self.kind.operator} does not run",
                pods,
                None,
            )
        self.check_start(pods, phase, missing)
        until = time.monotonic() + self.timeouts.poll
        for pod in self.client.watch(version, self.timeouts.poll):
            self.record_failures([pod])
        time.sleep(max(0.0, until - time.monotonic()))
        return False

    def handle_missing(self) -> bool:
        """Return True if the training was complete before the job was deleted; raise otherwise."""
        if self.finished():
            self.report("phase", f"{self.name} is gone, and its training is complete")
            return True
        raise RuntimeError(
            f"{self.name} was deleted before it ended, by somebody else or with its owner; or it failed "
            f"and its time to live has expired{self.explain([], None)}"
        )

    def record_failures(self, pods: list[dict]) -> None:
        """Report failed pods and keep the end of their logs, as the pods may be deleted soon."""
        for pod in pods:
            cause = failure_reason(pod)
            if cause is None:
                continue
            container = cause.container or self.kind.container
            restarts = restart_count(pod, container)
            text = f"{cause}{f'; restarted, {restarts} times in total' if cause.previous else ''}"
            if text != self.reported.get(cause.pod):
                self.report(cause.pod, text)
                lines = self.client.log(
                    cause.pod, tail=TAIL_LINES, previous=cause.previous, container=container
                )
                self.failures[cause.pod] = cause, [line.partition(" ")[2] for line in lines]

    def stream_logs(self, job: dict, pods: list[dict]) -> None:
        """Write the new lines of rank 0's log."""
        wanted = self.kind.rank0(job).items()
        for pod in pods:
            if wanted <= (pod["metadata"].get("labels") or {}).items():
                log = self.logs.setdefault(
                    pod["metadata"]["uid"], PodLog(self.client, self.kind.container)
                )
                for line in log.new_lines(pod):
                    self.out(line)

    def check_start(self, pods: list[dict], phase: str, missing: Cause | None) -> None:
        """Report why pods do not start; give up if the problem persists."""
        found = [
            cause
            for pod in pods
            if (cause := blocking_reason(pod) or startup_warning(pod, self.client.events))
        ]
        found += [missing] if missing else []
        # an elastic job can run with fewer nodes than requested
        elastic = "elasticPolicy" in self.job["spec"] and phase == "running"
        for topic in ("schedule", "start"):
            causes = [cause for cause in found if (cause.reason in BROKEN) == (topic == "start")]
            self.report(topic, f"waiting: {causes[0]}" if causes else "")
            if self.persists(topic, bool(causes) and not elastic, self.limits[topic]):
                self.give_up(
                    f"{self.name} cannot start, for {self.limits[topic]:.0f} s now", pods, causes[0]
                )

    def give_up(self, text: str, pods: list[dict], cause: Cause | None) -> NoReturn:
        """Suspend the job, or delete it if Kueue manages it. Raises RuntimeError."""
        explained = self.explain(pods, cause)
        if QUEUE in (self.current["metadata"].get("labels") or {}):
            self.client.delete()
            raise RuntimeError(f"{text}{explained}; it is deleted")
        self.fail(f"{text}{explained}; it is suspended", True)

    def fail(self, text: str, halt: bool) -> NoReturn:
        """Annotate the job with the cause; halt: also suspend it. Raises RuntimeError."""
        try:
            self.client.mark(text[:MAX_ANNOTATION], halt)
        except RuntimeError as error:
            self.out(f"launcher: cannot annotate the job with the cause: {error}")
        raise RuntimeError(text)

    def explain(self, pods: list[dict], cause: Cause | None) -> str:
        """Return the cause of a failure and the last log lines of the pod; "" if unknown."""
        cause = (
            cause
            or root_cause(found for pod in pods if (found := failure_reason(pod)))
            or root_cause(one for one, _ in self.failures.values())
        )
        if cause is None:
            return ""
        lines = self.failures[cause.pod][1] if cause.pod in self.failures else []
        shown = "\n  ".join(["\nlast lines of its log:", *lines]) if lines else ""
        killed = " (the system killed a process, most likely out of memory)"
        return f"\ncause: {cause}{killed if any('Signal 9 (SIGKILL)' in line for line in lines) else ''}{shown}"
