"""The failed pods of a job with the ends of their logs, and the cause of the job's failure."""

from __future__ import annotations

from datetime import datetime, timedelta

from components.launcher.client import JobClient
from components.launcher.logs import MAX_PODS, OUT_OF_GPU_MEMORY, TAIL, RankLogs, keep_newest
from components.launcher.restarts import OUT_OF_MEMORY, WINDOW
from components.launcher.status import Cause, failure_reason, root_cause

SHOWN_LINES = 30  # number of last log lines of a failed pod that are shown with the cause


class Failures:
    """The failures of a job's pods, including pods that no longer exist.

    found: maps a pod's name to its last failure and the last lines of its log.
    """

    def __init__(self, client: JobClient, ranks: RankLogs) -> None:
        self.client, self.ranks = client, ranks
        self.found: dict[str, tuple[Cause, list[str]]] = {}

    def add(self, cause: Cause, container: str) -> None:
        """Store a failure and the end of the container's log, as the pod may be deleted soon."""
        lines = self.client.log(cause.pod, tail=TAIL, previous=cause.previous, container=container)
        keep_newest(self.found, MAX_PODS - 1)
        self.found[cause.pod] = cause, [line.partition(" ")[2] for line in lines]

    def out_of_memory(self) -> tuple[Cause, str] | None:
        """Return an out-of-memory failure and its remedy, or None if there is no such failure."""
        for cause, lines in self.found.values():
            if cause.reason == OUT_OF_MEMORY and not cause.init:
                return cause, (
                    "raise the memory limit of the pods (`memory` in the cluster's values), or use "
                    "fewer data-loader workers"
                )
            if any(OUT_OF_GPU_MEMORY.search(line) for line in lines):
                return cause, (
                    "too many images for the GPU memory: change the settings that the error "
                    "message in the log names, or use more or larger GPUs"
                )
        return None

    def explain(self, pods: list[dict], cause: Cause | None) -> str:
        """Explain a failure: first failed rank, cause, last log lines; "" without a known cause."""
        cause = (
            cause
            or root_cause(found for pod in pods if (found := failure_reason(pod)))
            or root_cause(failure for failure, _ in self.found.values())
        )
        if cause is None:
            return ""
        lines = self.found[cause.pod][1][-SHOWN_LINES:] if cause.pod in self.found else []
        first = self.ranks.first_failure(time_before(cause.time))
        parts = [str(first)] if first else []
        killed = any("Signal 9 (SIGKILL)" in line for line in lines)
        hint = " (the system killed a process, most likely for lack of memory)" if killed else ""
        parts.append(f"cause: {cause}{hint}")
        if lines:
            parts.append("\n  ".join(["last lines of its log:", *lines]))
        return "".join(f"\n{part}" for part in parts)


def time_before(text: str) -> str:
    """Return an RFC 3339 time minus `WINDOW`, comparable with `Line.time`; "" if unknown."""
    if not text:
        return ""
    return f"{datetime.fromisoformat(text) - timedelta(seconds=WINDOW):%Y-%m-%dT%H:%M:%S}"
