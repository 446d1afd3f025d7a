"""Count the failures of a PyTorchJob by cause: disruptions and errors.

The training operator adds up the restarts of all containers, whatever the cause, so a job would end
after a few evictions. A failure of one pod makes all other pods fail, so failures are grouped
into incidents: failures of different pods within `WINDOW` form one incident. An incident with a
disruption counts as a disruption, even if other pods failed first: lost nodes are reported late.

The failures of a TrainJob are counted by JobSet's failure policy (manifests/trainjob/runtime.yaml).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from components.launcher.status import Cause, container_statuses, failure_reason, restart_count
from components.launcher.workflow import has_disruption_target

# seconds within which failures may be reported in any order, by two nodes or in one poll
SIMULTANEOUS = 5.0
# maximum duration of an incident in seconds: exceeds the timeout of a waiting rank (4 minutes) plus
# the time until Kubernetes evicts the pods of a node that does not respond (5 minutes)
WINDOW = 600.0
EVICTION = 360.0  # seconds until a lost node's pods are evicted: 50 s + 5 minutes + margin
OUT_OF_MEMORY = "OOMKilled"
# Messages of the kubelet about pods that exceed their limits (pkg/kubelet/eviction)
OWN_LIMITS = re.compile(
    "exceeds the limit|exceeds the total limit|exceeded its local ephemeral storage"
)
# Reasons of pods that were terminated or rejected by their node, if Kubernetes does not set the
# condition DisruptionTarget: pkg/kubelet (eviction, nodeshutdown, preemption, lifecycle) and
# pkg/controller/nodelifecycle. ContainerStatusUnknown and Unknown mean that the kubelet or the
# runtime did not see the container exit, because its node was restarted.
DISRUPTIONS = re.compile(
    "Evicted|NodeLost|NodeShutdown|Shutdown|Terminated|Preempting|NodeAffinity|OutOf.*"
    "|UnexpectedAdmissionError|Deleted|NodeNotReady|ContainerStatusUnknown|Unknown"
)


@dataclass
class Incident:
    """Failures with a common root cause.

    causes: maps a pod's name to the cause of its failure. failures: maps a pod's uid to the number
    of the pod's failures at the start of the incident.
    """

    start: float
    failures: dict[str, int]
    causes: dict[str, Cause] = field(default_factory=dict)
    disrupted: bool = False


class Restarts:
    """The incidents of one job. errors: the number of errors counted by earlier launchers."""

    def __init__(self, errors: int = 0) -> None:
        self.previous = errors
        self.incidents: list[Incident] = []
        self.failures: dict[str, int] = {}  # uid of a pod -> number of its failures
        self.disrupted: set[str] = set()  # uids of disrupted pods
        self.unresponsive: set[str] = set()  # uids of pods on a node that does not respond
        self.backing_off: set[str] = set()  # uids of pods whose container waits for its restart
        self.pods: dict[str, str] = {}  # name -> uid of each pod at the last poll
        self.initialized = self.incomplete = False

    @property
    def errors(self) -> int:
        """Return the number of incidents without a disruption, plus earlier launchers' errors."""
        return self.previous + sum(not incident.disrupted for incident in self.incidents)

    def decided_errors(self, now: float) -> int:
        """Return the number of errors, except a last incident that may prove to be a disruption."""
        last = self.incidents[-1] if self.incidents else None
        undecided = last is not None and not last.disrupted and not self.is_decided(now)
        return self.errors - undecided

    @property
    def disruptions(self) -> int:
        """Return the number of incidents that include a disruption."""
        return sum(incident.disrupted for incident in self.incidents)

    def observe(self, pod: dict, container: str, now: float) -> None:
        """Count a pod's failures since the last call. now: monotonic time in seconds.

        Failures in this launcher's first poll are not counted: an earlier launcher may have counted
        them.
        """
        name, uid = pod["metadata"]["name"], uid_of(pod)
        cause, before = failure_reason(pod), self.failures.get(uid, 0)
        count = failure_count(pod, cause, container) if cause else 0
        self.failures[uid] = max(count, before)
        if is_backing_off(pod, container):
            self.backing_off.add(uid)
        else:
            self.backing_off.discard(uid)
        if not self.initialized:
            return
        if not node_is_unresponsive(pod):
            self.unresponsive.discard(uid)
        elif uid not in self.unresponsive:
            self.unresponsive.add(uid)
            self.add(name, Cause(name, "NodeNotReady"), now, True)
        if cause is None:
            return
        # not a new error if another pod waits for a node or for its restart: this pod timed out
        for _ in range(count - before):
            if not self.join_last(name, uid, cause, now):
                self.add(name, cause, now, self.incomplete)
        if is_disruption(cause, pod) and uid not in self.disrupted:
            self.disrupted.add(uid)
            self.add(name, cause, now, True)

    def complete_poll(self, pods: list[dict], needed: int, now: float) -> None:
        """Count each pod that has disappeared since the last poll as a disruption.

        Ignores failed pods, which `observe` has counted. For a suspended job, see `forget_pods`.
        pods: all pods of the job. needed: number of running pods that the job needs to train.
        """
        current = {pod["metadata"]["name"]: uid_of(pod) for pod in pods}
        for name, uid in self.pods.items():
            seen = self.failures.get(uid) or uid in self.disrupted
            if current.get(name) != uid and not seen:
                self.add(name, Cause(name, "Deleted"), now, True)
        self.incomplete = sum(map(can_run, pods)) < needed
        self.backing_off &= set(current.values())
        self.pods, self.initialized = current, True

    def is_decided(self, now: float) -> bool:
        """Return whether a lost node can no longer turn the last incident into a disruption.

        The pod on a lost node does not fail by itself; it is evicted minutes later.
        """
        last = self.incidents[-1] if self.incidents else None
        return last is None or set(last.causes) >= set(self.pods) or now - last.start > EVICTION

    def forget_pods(self) -> None:
        """Forget the last poll, so that pods deleted by a suspension of the job are not counted."""
        self.pods = {}

    def add(self, name: str, cause: Cause, now: float, disrupted: bool) -> None:
        """Add a failure to the earliest recent incident that follows the pod's last one, if any.

        Otherwise, a disruption joins the last recent incident, and an error starts a new incident.
        """
        recent = [incident for incident in self.incidents if now - incident.start <= WINDOW]
        last = max((i for i, entry in enumerate(recent) if name in entry.causes), default=-1)
        incident = next(iter(recent[last + 1 :]), None)
        if incident is None and disrupted and recent:
            incident = recent[-1]  # the pod's earlier error was the first effect of its disruption
        if incident is None:
            incident = Incident(now, dict(self.failures))
            self.incidents.append(incident)
        incident.causes.setdefault(name, cause)
        incident.disrupted |= disrupted

    def join_last(self, name: str, uid: str, cause: Cause, now: float) -> bool:
        """Return whether the last incident caused this failure; if so, add the failure to it.

        The incident is the cause if another pod still waits for its restart after the incident. A
        pod in a crash loop does not count, as it has failed again since the incident.
        """
        last = self.incidents[-1] if self.incidents else None
        if last is None or now - last.start > WINDOW:
            return False
        if name not in last.causes and now - last.start <= SIMULTANEOUS:
            last.failures[uid] = self.failures[uid]
        waiting = self.backing_off - {uid}
        if not any(self.failures[uid] == last.failures.get(uid) for uid in waiting):
            return False
        last.causes.setdefault(name, cause)
        return True


def uid_of(pod: dict) -> str:
    """Return the uid of a pod, or its name if it has no uid."""
    return pod["metadata"].get("uid") or pod["metadata"]["name"]


def is_disruption(cause: Cause, pod: dict) -> bool:
    """Return whether this pod was ended by a disruption, e.g. an eviction or the loss of its node.

    The eviction of a pod that exceeded its limits does not count: a restart would not help.
    """
    if cause.reason == OUT_OF_MEMORY:
        return False
    if cause.reason == "Evicted" and OWN_LIMITS.search(cause.message):
        return False
    reason = (pod.get("status") or {}).get("reason") or cause.reason
    return (
        is_deleted_before(pod, cause.time)
        or has_disruption_target(pod)
        or DISRUPTIONS.fullmatch(reason) is not None
    )


def is_deleted_before(pod: dict, time: str) -> bool:
    """Return whether a pod was deleted before its failure at `time` ("" if unknown)."""
    metadata = pod["metadata"]
    if "deletionTimestamp" not in metadata:
        return False
    grace = timedelta(seconds=metadata.get("deletionGracePeriodSeconds") or 0)
    requested = datetime.fromisoformat(metadata["deletionTimestamp"]) - grace
    return not time or datetime.fromisoformat(time) >= requested


def can_run(pod: dict) -> bool:
    """Return whether this pod trains, or will train when its container has been restarted."""
    running = (pod.get("status") or {}).get("phase") == "Running"
    return running and "deletionTimestamp" not in pod["metadata"] and not node_is_unresponsive(pod)


def failure_count(pod: dict, cause: Cause, container: str) -> int:
    """Return how often the container of `cause` (default: `container`) has failed.

    The kubelet increases restartCount only after the back-off.
    """
    name = cause.container or container
    not_restarted = not cause.previous or is_backing_off(pod, name)
    return restart_count(pod, name) + not_restarted


def is_backing_off(pod: dict, container: str) -> bool:
    """Return whether this container has failed and waits until the kubelet restarts it."""
    return any(
        ((status.get("state") or {}).get("waiting") or {}).get("reason") == "CrashLoopBackOff"
        for status in container_statuses(pod)
        if status.get("name") == container
    )


def node_is_unresponsive(pod: dict) -> bool:
    """Return whether the node of this running pod does not respond.

    The node controller sets the condition Ready of such a node's pods to False; the containers'
    statuses do not change (pkg/controller/util/node/controller_utils.go, MarkPodsNotReady).
    """
    status = pod.get("status") or {}
    conditions = {c["type"]: c.get("status") for c in status.get("conditions") or []}
    containers = status.get("containerStatuses") or []
    return (
        status.get("phase") == "Running"
        and conditions.get("Ready") == "False"
        and bool(containers)
        and all(c.get("ready") and "running" in (c.get("state") or {}) for c in containers)
    )
