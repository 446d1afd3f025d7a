"""Why a pod of a job ended or does not start, from its status as the API server gives it: dictionaries in, words out.

The shapes are those of the Kubernetes API (core/v1 PodStatus): a container that ended has state.terminated {exitCode,
reason: OOMKilled | Error | Completed, finishedAt}, one that was started again has it under lastState; a pod that its
node gave up has status.phase Failed with status.reason (Evicted, NodeLost, Terminated) and no such container state,
or a condition DisruptionTarget; a pod without a node has the condition PodScheduled False, reason Unschedulable.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass

# Reasons of state.waiting that no waiting mends: someone has to change the image's name, a Secret, a command.
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


@dataclass(frozen=True)
class Cause:
    """What befell a pod. own: the reason stands for itself; a bare exit code may echo another pod's end."""

    pod: str
    reason: str
    exit_code: int | None = None
    message: str = ""
    when: str = ""
    node: str = ""
    previous: bool = False  # the container runs again: its log is that of the instance before
    container: str = ""
    init: bool = False  # that is an init container
    what: str = "pod"  # or "job", that has no pod

    @property
    def own(self) -> bool:
        return self.reason not in ("Error", "Completed", "")

    def __str__(self) -> str:
        code = (
            ""
            if self.exit_code is None
            else f", exit code {self.exit_code}{named_signal(self.exit_code)}"
        )
        node = f" on node {self.node}" if self.node else ""
        where = f"init container {self.container}: " if self.init else ""
        message = f": {self.message.strip()}" if self.message else ""
        return f"{self.what} {self.pod}{node}: {where}{self.reason}{code}{message}"


def named_signal(code: int) -> str:
    """` (SIGKILL)` for 137 and so on: a shell adds the signal's number to 128."""
    try:
        return f" ({signal.Signals(code - 128).name})" if code > 128 else ""
    except ValueError:
        return ""


def failure(pod: dict) -> Cause | None:
    """How this pod, or the instance of its container before this one, failed; None when nothing did."""
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    node = (pod.get("spec") or {}).get("nodeName") or ""
    containers = [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]
    inits = len(status.get("initContainerStatuses") or [])
    ends = [
        (part, key == "lastState", one.get("name") or "", place < inits)
        for key in ("state", "lastState")
        for place, one in enumerate(containers)
        if (part := (one.get(key) or {}).get("terminated")) and part.get("exitCode")
    ]
    if ends and ends[0][0].get("reason") not in (None, "Error"):
        return ended(name, node, *ends[0])  # OOMKilled says more than what the pod says of itself
    for one in status.get("conditions") or []:
        if one["type"] == "DisruptionTarget" and one.get("status") == "True":
            return Cause(
                name,
                one.get("reason") or "Disrupted",
                ends[0][0]["exitCode"] if ends else None,
                one.get("message") or "",
                one.get("lastTransitionTime") or "",
                node,
            )
    if status.get("phase") == "Failed" and status.get("reason"):
        return Cause(
            name,
            status["reason"],
            ends[0][0]["exitCode"] if ends else None,
            status.get("message") or "",
            ends[0][0].get("finishedAt") or "" if ends else "",
            node,
        )
    return ended(name, node, *ends[0]) if ends else None


def ended(
    name: str, node: str, terminated: dict, previous: bool, container: str, init: bool
) -> Cause:
    """The cause that a container's state.terminated tells."""
    return Cause(
        name,
        terminated.get("reason") or "Error",
        terminated["exitCode"],
        terminated.get("message") or "",
        terminated.get("finishedAt") or "",
        node,
        previous,
        container,
        init,
    )


def first(causes: Iterable[Cause]) -> Cause | None:
    """The cause of the others: of those not mended by a new start one that stands for itself, else the earliest.

    When one process of a distributed training dies, all others end with an error of their own, soon after.
    """
    return min(
        causes, key=lambda cause: (cause.previous, not cause.own, cause.when or "9"), default=None
    )


def hindrance(pod: dict) -> Cause | None:
    """Why this pod does not start; None when it did or is about to."""
    status, name = pod.get("status") or {}, pod["metadata"]["name"]
    for one in status.get("conditions") or []:
        if one["type"] == "PodScheduled" and one.get("status") == "False":
            return Cause(
                name, one.get("reason") or "Unschedulable", message=one.get("message") or ""
            )
    for one in [
        *(status.get("initContainerStatuses") or []),
        *(status.get("containerStatuses") or []),
    ]:
        waiting = (one.get("state") or {}).get("waiting") or {}
        if waiting.get("reason") in BROKEN:
            return Cause(name, waiting["reason"], message=waiting.get("message") or "")
    for one in (
        status.get("initContainerStatuses") or []
    ):  # the operators count restarts of running pods only
        last = (one.get("lastState") or {}).get("terminated") or {}
        done = ((one.get("state") or {}).get("terminated") or {}).get("exitCode") == 0
        if one.get("restartCount") and last.get("exitCode") and not done and not one.get("ready"):
            return Cause(
                name,
                "CrashLoopBackOff",
                last["exitCode"],
                container=one.get("name") or "",
                init=True,
            )
    return None


def restarts(pod: dict, container: str) -> int:
    """How often the node has started this container again."""
    status = pod.get("status") or {}
    found = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    return next((one.get("restartCount", 0) for one in found if one.get("name") == container), 0)
