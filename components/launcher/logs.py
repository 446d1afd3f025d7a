"""The logs of a job's pods, split by rank to find the first rank that failed.

torchrun prefixes the lines of its processes with their rank, e.g. `[rank3]:` (PET_TEE and
TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE in the job's manifest), but not the lines of torchrun
itself. Without these environment variables, lines are assigned to pods only.
"""

from __future__ import annotations

import re
import time
from collections import deque
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import NamedTuple

from components.launcher.client import JobClient
from components.launcher.status import container_statuses, restart_count

TAIL = 200  # number of last lines of each rank that are kept
MAX_PODS = 256  # maximum number of pods whose lines are kept
MAX_FIRST_LINES = 1000  # maximum number of lines in the first read of a pod's log
# seconds for which the lines of a restarted container are held back if the log of its previous
# instance cannot be read yet, so that the lines stay in order
HOLD_SECONDS = 15.0
PREFIX = re.compile(r"\[rank(\d+)\]:")
# Start of an error: an exception, a message of the CLI, a crash of the interpreter or of C++ code
ERROR = re.compile(
    r"Traceback \(most recent call last\)|vitdet: |Fatal Python error|terminate called"
)
# Message of vitdet/training/watchdog.py about a stalled rank
STALLED = re.compile(r"no progress: rank (\d+)")
# A failure in torchrun's summary (torch/distributed/elastic/multiprocessing/errors)
SUMMARY = re.compile(r"^  (time|rank|exitcode)\s*: (\S+)")
OUT_OF_GPU_MEMORY = re.compile(r"OutOfMemoryError|CUDA out of memory")


class Line(NamedTuple):
    """A line of a log, with its time as text that sorts chronologically."""

    time: str
    text: str


class PodLog:
    """A pod's log; returns each line once, even if the container or the API server restarts."""

    def __init__(self, client: JobClient, container: str) -> None:
        self.client, self.container = client, container
        self.last_time, self.last_read, self.restarts = "", 0.0, 0
        self.held_since: float | None = None  # monotonic time; None if no lines are held back

    def new_lines(self, pod: dict, final: bool = False) -> list[Line]:
        """Return the lines since the previous call; final: whether this is the last call."""
        name, restarts = pod["metadata"]["name"], restart_count(pod, self.container)
        start = time.monotonic()
        since = round(start - self.last_read) + 2 if self.last_read else None
        lines: list[str] = []
        if restarts != self.restarts and self.last_read:
            lines += self.client.log(name, since=since, previous=True)
            if not lines and not final and can_be_read_later(pod, self.container):
                if self.held_since is None:
                    self.held_since = start
                if start - self.held_since < HOLD_SECONDS:
                    return []
        self.held_since = None
        lines += self.client.log(name, since=since, tail=None if since else MAX_FIRST_LINES)
        self.restarts = restarts
        new = []
        for when, _, text in (line.partition(" ") for line in lines):
            if comparable_time(when) > self.last_time:
                self.last_time = comparable_time(when)
                new.append(Line(self.last_time, text))
        if lines:
            self.last_read = start
        return new


def can_be_read_later(pod: dict, container: str) -> bool:
    """Return whether this container is running and its pod is not being deleted."""
    statuses = [status for status in container_statuses(pod) if status.get("name") == container]
    running = any("running" in (status.get("state") or {}) for status in statuses)
    return running and "deletionTimestamp" not in pod["metadata"]


def comparable_time(text: str) -> str:
    """Convert an RFC 3339 time to UTC with nine decimal places, so that times sort as text.

    The times in logs are in the time zone of the node.
    """
    fraction = re.sub(r"^[^.]*\.?(\d*).*", r"\1", text)
    return f"{datetime.fromisoformat(text).astimezone(UTC):%Y-%m-%dT%H:%M:%S}.{fraction:0<9}"


@dataclass(frozen=True)
class Failure:
    """The first failure of a rank. signal: number of the signal that ended it, or 0."""

    rank: str
    pod: str
    time: str
    error: str
    signal: int = 0

    def __str__(self) -> str:
        pod = f" (pod {self.pod})" if self.rank.startswith("rank ") else ""
        return f"first to fail: {self.rank}{pod}: {self.error}"


class RankLogs:
    """The last lines of each rank, and of torchrun in each pod, including pods that are gone."""

    def __init__(self) -> None:
        self.lines: dict[str, deque[Line]] = {}  # "rank 3" or "pod NAME" -> its last lines
        self.pods: dict[str, str] = {}  # "rank 3" or "pod NAME" -> the name of the pod

    def add(self, pod: str, lines: list[Line], main: bool) -> list[str]:
        """Store a pod's lines; return rank 0's, and torchrun's if rank 0 may run there (`main`)."""
        shown = []
        for when, text in lines:
            prefix = PREFIX.match(text)
            if prefix:
                text = text[prefix.end() :]
            source = f"rank {prefix[1]}" if prefix else f"pod {pod}"
            if source not in self.lines and not prefix:
                pods = [line for line in self.lines if line.startswith("pod ")]
                if len(pods) >= MAX_PODS:
                    del self.lines[pods[0]], self.pods[pods[0]]
            self.lines.setdefault(source, deque(maxlen=TAIL)).append(Line(when, text))
            self.pods[source] = pod
            if prefix[1] == "0" if prefix else main:
                shown.append(text)
        return shown

    def tails(self) -> dict[str, list[str]]:
        """Return the last lines of each rank and pod, ordered by rank, then by pod."""
        ordered = sorted(self.lines, key=source_order)
        return {source: [line.text for line in self.lines[source]] for source in ordered}

    def files(self) -> dict[str, str]:
        """Return the last lines of each rank and pod, by file name, e.g. rank-00003.log."""
        files = {}
        for source, lines in self.tails().items():
            kind, _, name = source.partition(" ")
            name = f"{int(name):05d}" if kind == "rank" else name
            files[f"{kind}-{name}.log"] = "".join(f"{line}\n" for line in lines)
        return files

    def first_failure(self, since: str = "") -> Failure | None:
        """Return the first failure after the time `since`; None if no log contains a failure.

        When a rank is killed, the other ranks lose their connection to it and often fail within the
        same second. Times in torchrun's summaries are in whole seconds; therefore, a rank that was
        killed by a signal takes precedence. SIGTERM is ignored, as torchrun itself sends it.
        """
        found = [*self.errors(since), *self.summaries(since)]
        return min(found, key=lambda failure: (not failure.signal, failure.time), default=None)

    def errors(self, since: str) -> list[Failure]:
        """Return the first error of each rank, and of each pod whose lines have no rank prefix."""
        failures = []
        split = {pod for source, pod in self.pods.items() if source.startswith("rank ")}
        for source, lines in self.lines.items():
            if source.startswith("pod ") and self.pods[source] in split:
                continue
            texts = [line for line in lines if line.time > since]
            start = next((n for n, line in enumerate(texts) if ERROR.match(line.text)), None)
            if start is None:
                continue
            error = error_text([line.text for line in texts[start:]])
            # any rank may report that another rank does not respond
            stalled = STALLED.search(error)
            rank = f"rank {stalled[1]}" if stalled else source
            pod = self.pods.get(rank, self.pods[source])
            failures.append(Failure(rank, pod, texts[start].time, error))
        return failures

    def summaries(self, since: str) -> list[Failure]:
        """Return the failures that torchrun's summaries attribute to signals other than SIGTERM."""
        failures = []
        for source, lines in self.lines.items():
            values: dict[str, str] = {}
            for line in lines:
                found = SUMMARY.match(line.text) if line.time > since else None
                if found is None:
                    continue
                values[found[1]] = found[2]
                signal = -int(found[2]) if found[1] == "exitcode" else 0
                if signal > 0 and signal != 15 and "rank" in values:
                    rank, error = f"rank {values['rank']}", f"ended by signal {signal}"
                    failures.append(Failure(rank, self.pods[source], line.time, error, signal))
        return failures


def keep_newest(entries: dict, most: int) -> None:
    """Remove the oldest entries until at most `most` entries remain."""
    for key in list(entries)[: max(0, len(entries) - most)]:
        del entries[key]


def source_order(source: str) -> tuple[bool, int, str]:
    """Return a sort key: ranks by number (`rank 3`), then pods by name (`pod NAME`)."""
    kind, _, name = source.partition(" ")
    return kind == "pod", int(name) if kind == "rank" else 0, name


def error_text(lines: list[str]) -> str:
    """Return the message of an error: the line after a traceback's frames, else the first line."""
    if lines[0].startswith("Traceback"):
        for line in lines[1:]:
            if line and not line.startswith(" "):
                return line
    return lines[0]
