"""The state of a job: why its pods fail or do not start, how long a finished job is kept.

Pure functions of dictionaries as returned by the Kubernetes API. Pod states (core/v1 PodStatus): A
terminated container has state.terminated {exitCode, reason: OOMKilled | Error | Completed,
finishedAt}, or lastState.terminated after a restart. A pod lost with its node has status.phase
Failed and a status.reason (Evicted, NodeLost, Terminated) without a terminated container, or the
condition DisruptionTarget. A pod without a node has the condition PodScheduled with status False
and reason Unschedulable.

Some problems are reported only by events (core/v1 Event). If the API server rejects a pod (a quota,
a missing PriorityClass or ServiceAccount, Pod Security), the training operator 1.9 creates the
event FailedCreatePod for the job and returns before it writes the job's status
(pkg/controller.v1/control/pod_control.go); for a Job of Trainer's JobSet, Kubernetes creates the
event FailedCreate. If a JobSet, Job or Service cannot be created, Trainer or JobSet creates an
event of the TrainJob or JobSet, e.g. TrainJobResourcesCreationFailed. If a volume or network cannot
be set up, the kubelet creates the event FailedMount or FailedCreatePodSandBox for the pod, whose
status stays ContainerCreating.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta

from components.launcher.templates import Kind

EventQuery = Callable[[str], list[dict]]  # field selector -> matching events
CLOCK_SKEW = timedelta(seconds=60)  # maximum between the API server and the operator

# Values of state.waiting.reason that require a fix to the image, a Secret or the command
BROKEN = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "ImageInspectError",
    "RegistryUnavailable",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)


def job_phase(kind: Kind, job: dict) -> tuple[str, str]:
    """Return (phase, message) from the job's status; ("", "") if the operator has not set a status.

    Ignores the order of the conditions, as controllers keep old conditions and do not sort them.
    Ignores conditions from before the job's creation: until Kubernetes has deleted the JobSet of a
    deleted TrainJob, Trainer copies its conditions to a new TrainJob of the same name
    (pkg/runtime/framework/plugins/jobset).
    """
    status = job.get("status") or {}
    true = {
        condition["type"]: condition
        for condition in status.get("conditions") or []
        if condition.get("status") == "True" and not is_inherited(condition, job)
    }
    for condition, phase in kind.phases:
        if condition in true:
            return phase, true[condition].get("message") or true[condition].get("reason") or ""
    if any(job_status.get("ready") for job_status in status.get("jobsStatus") or []):
        return "running", ""
    created = status.get("jobsStatus") or status.get("replicaStatuses")
    return ("created" if created else ""), ""


def is_inherited(condition: dict, job: dict) -> bool:
    """Return whether a condition is from before the job's creation."""
    changed, created = condition.get("lastTransitionTime"), creation_time(job)
    if not changed or not created:
        return False
    return datetime.fromisoformat(changed) + CLOCK_SKEW < datetime.fromisoformat(created)


def deadline_exceeded(job: dict, message: str) -> str:
    """Describe the deadline if the job failed because it exceeded the deadline; else "".

    Only the message identifies this case, as the training operator uses one reason for all failures
    (common/job.go, ReconcileJobs): "... active longer than specified deadline", or for a TrainJob
    "... exceeded its active deadline".
    """
    return f"the deadline (activeDeadlineSeconds: {deadline(job)})" if "deadline" in message else ""


def deadline(job: dict) -> str:
    """Return the maximum run time of a job, e.g. `1209600 s`; "" without a deadline."""
    spec = job["spec"]
    seconds = (spec.get("runPolicy") or spec).get("activeDeadlineSeconds")
    return f"{seconds} s" if seconds else ""


def retention(kind: Kind, job: dict) -> str:
    """Return the phase of a finished job and how long it is kept; "" for an unfinished job."""
    phase, spec, status = job_phase(kind, job)[0], job["spec"], job.get("status") or {}
    if phase not in ("failed", "succeeded"):
        return ""
    seconds = (spec.get("runPolicy") or spec).get("ttlSecondsAfterFinished")
    ended = status.get("completionTime") or max(
        condition.get("lastTransitionTime") or "" for condition in status["conditions"]
    )
    until = []
    if seconds is not None and ended:
        expiry = datetime.fromisoformat(ended) + timedelta(seconds=seconds)
        until.append(f"{expiry:%Y-%m-%d %H:%M} UTC")
    if job["metadata"].get("ownerReferences"):
        until.append("its run is deleted")
    kept = " or ".join(until) or "it is deleted manually"
    return f"{phase}; kept, with the logs of the remaining pods, until {kept}"


def annotations_of(resource: dict) -> dict[str, str]:
    """Return the annotations; {} if there are none."""
    return resource["metadata"].get("annotations") or {}


def creation_time(resource: dict) -> str:
    """Return the time at which the API server created this object; "" if unknown."""
    return resource["metadata"].get("creationTimestamp") or ""


@dataclass(frozen=True)
class Cause:
    """Why a pod failed or does not start; `str()` formats it as one line for the user.

    previous: whether the container was restarted, so that the log of its previous instance contains
    the failure. init: whether `container` is an init container. subject: "pod", or "job" if `pod`
    is the name of a job whose pods cannot be created.
    """

    pod: str
    reason: str
    exit_code: int | None = None
    message: str = ""
    time: str = ""
    node: str = ""
    previous: bool = False
    container: str = ""
    init: bool = False
    subject: str = "pod"

    @property
    def specific(self) -> bool:
        """Return whether the reason explains the failure; `Error` and `Completed` do not."""
        return self.reason not in ("Error", "Completed", "")

    def __str__(self) -> str:
        code = ""
        if self.exit_code is not None:
            code = f", exit code {self.exit_code}{signal_name(self.exit_code)}"
        node = f" on node {self.node}" if self.node else ""
        where = f"init container {self.container}: " if self.init else ""
        message = f": {self.message.strip()}" if self.message else ""
        return f"{self.subject} {self.pod}{node}: {where}{self.reason}{code}{message}"


def signal_name(code: int) -> str:
    """Return the signal of an exit code above 128 as text, e.g. ` (SIGKILL)` for 137; else ""."""
    try:
        return f" ({signal.Signals(code - 128).name})" if code > 128 else ""
    except ValueError:
        return ""


def container_statuses(pod: dict) -> list[dict]:
    """Return the statuses of all containers, init containers first."""
    status = pod.get("status") or {}
    return [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]


def failure_reason(pod: dict) -> Cause | None:
    """Return why this pod or the previous instance of its container failed; None if neither did."""
    status = pod.get("status") or {}
    name, node = pod["metadata"]["name"], (pod.get("spec") or {}).get("nodeName") or ""
    inits = [init.get("name") for init in status.get("initContainerStatuses") or []]
    terminated = (
        ((part.get(key) or {}).get("terminated") or {}, part.get("name") or "", key == "lastState")
        for key in ("state", "lastState")
        for part in container_statuses(pod)
    )
    first = next(
        (
            Cause(
                name,
                state.get("reason") or "Error",
                state["exitCode"],
                state.get("message") or "",
                state.get("finishedAt") or "",
                node,
                previous,
                container,
                container in inits,
            )
            for state, container, previous in terminated
            if state.get("exitCode")
        ),
        None,
    )
    if first and first.reason != "Error":
        return first  # OOMKilled is more specific than the status of the pod
    code, time = (first.exit_code, first.time) if first else (None, "")
    for entry in status.get("conditions") or []:
        if entry["type"] == "DisruptionTarget" and entry.get("status") == "True":
            reason, message = entry.get("reason") or "Disrupted", entry.get("message") or ""
            return Cause(name, reason, code, message, entry.get("lastTransitionTime") or "", node)
    if status.get("phase") == "Failed" and status.get("reason"):
        return Cause(name, status["reason"], code, status.get("message") or "", time, node)
    return first


def root_cause(causes: Iterable[Cause]) -> Cause | None:
    """Return the most likely root cause, or None if there are no causes.

    When a process of a distributed run dies, all other processes fail soon after. Prefers failures
    of containers that have not been restarted, then specific reasons, then the earliest failure.
    """
    return min(causes, key=lambda c: (c.previous, not c.specific, c.time or "9"), default=None)


def blocking_reason(pod: dict) -> Cause | None:
    """Return why this pod does not start; None if it has started or is starting."""
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    for condition in status.get("conditions") or []:
        if condition["type"] == "PodScheduled" and condition.get("status") == "False":
            reason = condition.get("reason") or "Unschedulable"
            return Cause(name, reason, message=condition.get("message") or "")
    for container in container_statuses(pod):
        waiting = (container.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in BROKEN:
            return Cause(name, waiting["reason"], message=waiting.get("message") or "")
    # an init container that keeps failing: the operators count only restarts of running pods
    for init in status.get("initContainerStatuses") or []:
        last = (init.get("lastState") or {}).get("terminated") or {}
        done = ((init.get("state") or {}).get("terminated") or {}).get("exitCode") == 0
        if init.get("restartCount") and last.get("exitCode") and not done and not init.get("ready"):
            code, failed = last["exitCode"], init.get("name") or ""
            return Cause(name, "CrashLoopBackOff", code, container=failed, init=True)
    return None


def restart_count(pod: dict, container: str) -> int:
    """Return how often the kubelet has restarted this container."""
    found = container_statuses(pod)
    return next((c.get("restartCount", 0) for c in found if c.get("name") == container), 0)


def expected_pods(job: dict) -> int:
    """Return the number of pods that the job's spec requests."""
    replicas = job["spec"].get("pytorchReplicaSpecs")
    if replicas:
        return sum(replica.get("replicas", 1) for replica in replicas.values())
    return (job["spec"].get("trainer") or {}).get("numNodes", 1)


def missing_pods(job: dict, pods: list[dict], events: EventQuery) -> Cause | None:
    """Return why pods of the job are missing; None if all exist or the reason is unknown."""
    if len(pods) >= expected_pods(job):
        return None
    name = job["metadata"]["name"]
    # the names of a TrainJob's JobSet and of its Jobs begin with the TrainJob's name
    own = f"involvedObject.uid={job['metadata'].get('uid')}"
    if "pytorchReplicaSpecs" not in job["spec"]:
        own = "involvedObject.kind!=Pod"
    found = [
        event
        for event in events(f"type=Warning,{own}")
        if re.match("FailedCreate|.*CreationFailed", event["reason"])
        and f"{event['involvedObject']['name']}-".startswith(f"{name}-")
        and event_time(event) >= creation_time(job)
    ]
    return event_cause(max(found, key=event_time), name, "job") if found else None


def startup_warning(pod: dict, events: EventQuery) -> Cause | None:
    """Return why a scheduled pod does not start, if its last event is a warning; else None."""
    scheduled = (pod.get("spec") or {}).get("nodeName")
    if (pod.get("status") or {}).get("phase") != "Pending" or not scheduled:
        return None
    own = events(f"involvedObject.uid={pod['metadata']['uid']}")
    last = max(own, key=event_time, default={})
    return event_cause(last, pod["metadata"]["name"]) if last.get("type") == "Warning" else None


def event_time(event: dict) -> str:
    """Return the time of the event's last occurrence, to the second; "" if unknown."""
    series = event.get("series") or {}
    time = (
        event.get("lastTimestamp")
        or series.get("lastObservedTime")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
        or ""
    )
    return time[:19] + "Z" if time else ""


def event_cause(event: dict, name: str, subject: str = "pod") -> Cause:
    """Return a cause with the event's reason and message."""
    message = " ".join((event.get("message") or "").split())
    return Cause(name, event["reason"], message=message, subject=subject)
