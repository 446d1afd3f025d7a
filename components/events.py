"""What only the events of a cluster tell: a pod that the API server refuses to make, one whose volume does not come.

The training operator 1.9 answers a refusal (a quota, a missing PriorityClass or ServiceAccount, Pod Security) with the
event FailedCreatePod of the job and returns before it writes the job's status (pkg/controller.v1/control/
pod_control.go); Kubernetes' Job, which Trainer's JobSet makes, with FailedCreate. A kubelet tells of FailedMount and
FailedCreatePodSandBox by events of the pod alone, whose status stays ContainerCreating. Shapes: core/v1 Event.
"""

from __future__ import annotations

from collections.abc import Callable

from components.causes import Cause

Ask = Callable[[str], list[dict]]  # the events that a field selector selects


def wished(job: dict) -> int:
    """How many pods a job is to have."""
    replicas = job["spec"].get("pytorchReplicaSpecs")
    return (
        sum(one.get("replicas", 1) for one in replicas.values())
        if replicas
        else ((job["spec"].get("trainer") or {}).get("numNodes", 1))
    )


def unmade(job: dict, pods: list[dict], ask: Ask) -> Cause | None:
    """Why this job has fewer pods than wished; None when it has them all, or no event says why."""
    if len(pods) >= wished(job):
        return None
    metadata = job["metadata"]
    name, since = metadata["name"], metadata.get("creationTimestamp") or ""
    own = (
        f"involvedObject.uid={metadata.get('uid')}"
        if "pytorchReplicaSpecs" in job["spec"]
        else ("involvedObject.kind=Job")
    )  # of the JobSet's; their names begin with the job's
    found = [
        one
        for one in ask(f"type=Warning,{own}")
        if one["reason"].startswith("FailedCreate")
        and f"{one['involvedObject']['name']}-".startswith(f"{name}-")
        and when(one) >= since
    ]
    return told(max(found, key=when), name, "job") if found else None


def stalled(pod: dict, ask: Ask) -> Cause | None:
    """Why a pod that has its node does not start, where the last that happened to it is a warning; else None."""
    if (pod.get("status") or {}).get("phase") != "Pending" or not (pod.get("spec") or {}).get(
        "nodeName"
    ):
        return None
    last = max(ask(f"involvedObject.uid={pod['metadata']['uid']}"), key=when, default=None)
    return told(last, pod["metadata"]["name"]) if last and last.get("type") == "Warning" else None


def when(event: dict) -> str:
    """The time at which it happened last, to the second."""
    series = event.get("series") or {}
    time = (
        event.get("lastTimestamp")
        or series.get("lastObservedTime")
        or event.get("eventTime")
        or event["metadata"].get("creationTimestamp")
        or ""
    )
    return time[:19] + "Z" if time else ""


def told(event: dict, name: str, what: str = "pod") -> Cause:
    """The event in one line."""
    return Cause(
        name, event["reason"], message=" ".join((event.get("message") or "").split()), what=what
    )
