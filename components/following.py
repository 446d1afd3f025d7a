"""From a job that is to be to its end: made or taken over, told about, waited for, its failure explained.

It looks at the job every few seconds rather than rely on a watch: a look needs no state that a dropped connection or a
new API server could lose. Between two looks it watches the pods, so that a cause that lives for a moment only (the
operator replaces a killed pod at once) is not missed.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from components.causes import BROKEN, Cause, failure, first, hindrance, restarts
from components.events import stalled, unmade
from components.jobs import Kind, overrun, state

SCHEDULE = (
    "vitdet/schedule-seconds"  # annotation of a job file: how long its pods may wait for a node
)
FAILURE = (
    "vitdet/failure"  # annotation that the launcher writes: why the job has failed, or was given up
)
MOST = 32_000  # characters of it; the API server takes 256 KiB of annotations
QUEUE = (
    "kueue.x-k8s.io/queue-name"  # label of a job that Kueue suspends and resumes: nobody else can
)
TAIL = 30  # log lines of the failing replica
FIRST = 1000  # log lines at most of a job that was there before


@dataclass(frozen=True)
class Patience:
    """Seconds: between two looks; and how long is waited while the API server is silent, while it refuses what it has
    allowed before (one that has just started refuses until it has read the roles), for an operator's first sign, for
    a pod that cannot start (image, Secret, command), for a node (or a quota, a volume, an init container: the
    operator's own waits for the Master and fails every 200 s), for a deletion.
    """

    look: float = 5
    api: float = 600
    forbidden: float = 60
    operator: float = 300
    start: float = 300
    schedule: float = 3600
    deletion: float = 120


class Requests(Protocol):
    """What `components.pytorchjob.Cluster` can do; documented there."""

    def create(self, job: dict) -> bool: ...
    def get(self) -> dict | None: ...
    def adopt(self, owner: dict) -> None: ...
    def mark(self, failure: str, halt: bool) -> None: ...
    def delete(self) -> None: ...
    def pods(self) -> tuple[list[dict], str]: ...
    def changes(self, version: str, seconds: float) -> Iterable[dict]: ...
    def events(self, selector: str) -> list[dict]: ...
    def log(
        self,
        pod: str,
        since: int | None = None,
        tail: int | None = None,
        previous: bool = False,
        container: str = "",
    ) -> list[str]: ...


class Log:
    """What is new in a pod's log, each line once, through restarts of its container and of the API server."""

    def __init__(self, cluster: Requests, container: str) -> None:
        self.cluster, self.container = cluster, container
        self.last, self.read, self.instance = "", 0.0, 0
        self.tail: deque[str] = deque(maxlen=TAIL)

    def news(self, pod: dict) -> list[str]:
        """The lines since the last call."""
        name, instance = pod["metadata"]["name"], restarts(pod, self.container)
        since = round(time.monotonic() - self.read) + 2 if self.read else None
        start, lines = time.monotonic(), []
        if instance != self.instance and self.read:
            lines += self.cluster.log(name, since=since, previous=True)
        lines += self.cluster.log(name, since=since, tail=None if since else FIRST)
        self.instance = instance
        fresh = []
        for when, _, text in (line.partition(" ") for line in lines):
            if moment(when) > self.last:
                fresh.append(text)
                self.last = moment(when)
        if lines:
            self.read = start
        self.tail.extend(fresh)
        return fresh


def moment(when: str) -> str:
    """A time of RFC 3339 with all nine digits of its fraction, which are left out when they are 0: comparable."""
    whole, _, fraction = when.removesuffix("Z").partition(".")
    return f"{whole}.{fraction:0<9}"


class Follower:
    """One job, from its creation to its end.

    A job that has failed, or could not start, would do so again. So it is kept, with the cause written on it, and a
    step that is retried says that again instead of training again. finished: whether what it was made for is there,
    for when it is gone or failed. first: this is no retry, so that a failed job that is there is one of before the user
    started the run again.
    """

    def __init__(
        self,
        cluster: Requests,
        kind: Kind,
        job: dict,
        out: Callable[[str], None],
        patience: Patience,
        finished: Callable[[], bool] = lambda: False,
        first: bool = False,
    ) -> None:
        self.first, self.there = first, job
        self.cluster, self.kind, self.job, self.out, self.patience = (
            cluster,
            kind,
            job,
            out,
            patience,
        )
        self.finished = finished
        self.name = f"{kind.name} {job['metadata']['name']}"
        self.said: dict[str, str] = {}
        self.held: dict[str, float] = {}
        self.seen: dict[
            str, tuple[Cause, list[str]]
        ] = {}  # by pod: how it failed last, its log's end then
        self.logs: dict[str, Log] = {}
        self.limits = {"schedule": patience.schedule, "start": patience.start}
        own = (job["metadata"].get("annotations") or {}).get(SCHEDULE)
        if own:
            self.limits["schedule"] = float(own)

    def run(self) -> None:
        """Makes the job or takes it over, and returns when it has succeeded. Raises RuntimeError with the cause."""
        with self.deleted_on_signal():
            self.make()
            while not self.look():
                pass

    @contextmanager
    def deleted_on_signal(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C delete the job. Kubernetes gives a pod 30 s between SIGTERM and SIGKILL."""

        def stop(number: int, frame: object) -> None:
            raise SystemExit(128 + number)

        main = (
            threading.current_thread() is threading.main_thread()
        )  # only there signals can be handled
        before = signal.signal(signal.SIGTERM, stop) if main else None
        try:
            yield
        except (SystemExit, KeyboardInterrupt):
            if main:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
            self.out(f"launcher: this step is being stopped: {self.name} is deleted")
            self.cluster.delete()
            raise
        finally:
            if main:
                signal.signal(signal.SIGTERM, before)

    def say(self, topic: str, text: str) -> None:
        """Tells the step's log, once until the topic has something else to say."""
        if text and self.said.get(topic) != text:
            self.out(f"launcher: {text}")
        self.said[topic] = text

    def lasts(self, topic: str, holds: bool, limit: float) -> bool:
        """Whether something has held without a break for `limit` seconds."""
        if not holds:
            self.held.pop(topic, None)
            return False
        return time.monotonic() - self.held.setdefault(topic, time.monotonic()) >= limit

    def make(self) -> None:
        """Makes the job, or takes over the one that an earlier try of this step made."""
        wanted = self.job["metadata"]
        while not self.cluster.create(self.job):
            there = self.cluster.get()
            if there is None:
                continue
            labels = there["metadata"].get("labels") or {}
            if any(
                labels.get(key) != value
                for key, value in wanted["labels"].items()
                if key.startswith("vitdet/")
            ):
                raise RuntimeError(
                    f"{self.name} exists and is not of this run: its labels are {labels}"
                )
            told = (there["metadata"].get("annotations") or {}).get(FAILURE, "")
            over = self.first and (told or state(self.kind, there)[0] == "failed")
            if not over and "deletionTimestamp" not in there["metadata"]:
                self.take_over(told)
                return
            self.say(
                "made",
                f"{self.name} of an earlier try has failed or is being deleted: making it anew",
            )
            if self.lasts("deletion", True, self.patience.deletion):
                raise RuntimeError(
                    f"{self.name} of an earlier try is still being deleted: see its finalizers"
                )
            self.cluster.delete()
            time.sleep(min(self.patience.look, 1))
        self.say("made", f"{self.name} is made in namespace {wanted['namespace']}")

    def take_over(self, told: str) -> None:
        """Follows the job of an earlier try. Raises RuntimeError at once where that try has told why it failed."""
        meaning = "has told why it failed, no other is made" if told else "following it"
        self.say("made", f"{self.name} is there, from an earlier try of this step: {meaning}")
        owners = self.job["metadata"].get("ownerReferences")
        if owners:  # the pod of the earlier try may be deleted, and the job with it
            self.cluster.adopt(owners[0])
        if told:
            raise RuntimeError(told)

    def look(self) -> bool:
        """Tells what is new; True when the job has succeeded. Raises RuntimeError with the cause when it never will."""
        job = self.cluster.get()
        if job is None:
            return self.vanished()
        self.there, (phase, message) = job, state(self.kind, job)
        pods, version = self.cluster.pods()
        self.note(pods)
        meaning = (
            "suspended, a queue (Kueue) or somebody holds it back; waiting"
            if phase == "suspended"
            else phase
        )
        self.say(
            "phase",
            f"{self.name}: {meaning}" + (f" ({message})" if message else "") if phase else "",
        )
        self.tell_logs(job, pods)
        if phase == "succeeded":
            return True
        if (
            phase == "failed" and self.finished()
        ):  # by its deadline, say, or when a pod was lost at the very end
            self.say("complete", f"{self.name} failed when its training was complete already")
            return True
        if phase == "failed":
            late = overrun(job, message)  # its pods fail too, as the operator deletes them
            why = f"\ncause: {late}; its checkpoints stay" if late else self.explain(pods, None)
            self.fail(f"{self.name} failed: {message or 'its status says no more'}{why}", False)
        limit = self.patience.operator
        refused = None if phase == "suspended" else unmade(job, pods, self.cluster.events)
        if self.lasts("operator", not phase and not pods and not refused, limit):
            self.give_up(
                f"nothing has happened to {self.name} for {limit:.0f} s: {self.kind.operator} does not run",
                pods,
                None,
            )
        self.check_start(pods, phase, refused)
        until = time.monotonic() + self.patience.look
        for pod in self.cluster.changes(version, self.patience.look):
            self.note([pod])
        time.sleep(max(0.0, until - time.monotonic()))
        return False

    def vanished(self) -> bool:
        """True when the job had done its work before it went, as by its time to live. Raises RuntimeError else."""
        if self.finished():
            self.say("phase", f"{self.name} is gone, and its training is complete")
            return True
        raise RuntimeError(
            f"{self.name} was deleted before it ended, by somebody else or with its owner; or it failed "
            f"unseen, and its time to live is over{self.explain([], None)}"
        )

    def note(self, pods: list[dict]) -> None:
        """Tells and remembers how pods failed, with the ends of their logs: the operator may delete them at once."""
        for pod in pods:
            cause = failure(pod)
            if cause is None:
                continue
            container = cause.container or self.kind.container
            times = restarts(pod, container)
            text = f"{cause}{f'; started again, {times} times in all' if cause.previous else ''}"
            if text != self.said.get(cause.pod):
                self.say(cause.pod, text)
                lines = self.cluster.log(
                    cause.pod, tail=TAIL, previous=cause.previous, container=container
                )
                self.seen[cause.pod] = cause, [line.partition(" ")[2] for line in lines]

    def tell_logs(self, job: dict, pods: list[dict]) -> None:
        """Writes what is new in the log of rank 0."""
        wanted = self.kind.rank0(job).items()
        for pod in pods:
            if wanted <= (pod["metadata"].get("labels") or {}).items():
                log = self.logs.setdefault(
                    pod["metadata"]["uid"], Log(self.cluster, self.kind.container)
                )
                for line in log.news(pod):
                    self.out(line)

    def check_start(self, pods: list[dict], phase: str, refused: Cause | None) -> None:
        """Tells why pods do not start, and gives up when that has lasted."""
        found = [
            cause for pod in pods if (cause := hindrance(pod) or stalled(pod, self.cluster.events))
        ]
        found += [refused] if refused else []
        elastic = (
            "elasticPolicy" in self.job["spec"] and phase == "running"
        )  # fewer nodes than wished will do
        for topic in ("schedule", "start"):
            causes = [cause for cause in found if (cause.reason in BROKEN) == (topic == "start")]
            self.say(topic, f"waiting: {causes[0]}" if causes else "")
            if self.lasts(topic, bool(causes) and not elastic, self.limits[topic]):
                self.give_up(
                    f"{self.name} cannot start, for {self.limits[topic]:.0f} s now", pods, causes[0]
                )

    def give_up(self, text: str, pods: list[dict], cause: Cause | None) -> None:
        """Holds the job, which would else start some day with nobody to follow it. Raises RuntimeError."""
        explained = self.explain(pods, cause)
        if QUEUE in (self.there["metadata"].get("labels") or {}):
            self.cluster.delete()
            raise RuntimeError(f"{text}{explained}; it is deleted")
        self.fail(f"{text}{explained}; it is suspended", True)

    def fail(self, text: str, halt: bool) -> None:
        """Writes the cause on the job; halt: and lets it do nothing more. Raises RuntimeError with it."""
        try:
            self.cluster.mark(text[:MOST], halt)
        except RuntimeError as error:
            self.out(f"launcher: the cause could not be written on the job: {error}")
        raise RuntimeError(text)

    def explain(self, pods: list[dict], cause: Cause | None) -> str:
        """The cause of a failure and the last log lines of the pod that it befell, as far as anything is known."""
        cause = (
            cause
            or first(found for pod in pods if (found := failure(pod)))
            or first(one for one, _ in self.seen.values())
        )
        if cause is None:
            return ""
        lines = self.seen.get(cause.pod, (None, []))[1]
        shown = "\n  ".join(["\nlast lines of its log:", *lines]) if lines else ""
        killed = " (a process was killed by the system, most likely for want of memory)"
        return f"\ncause: {cause}{killed if any('Signal 9 (SIGKILL)' in line for line in lines) else ''}{shown}"
