"""The progress of a training run, from the lines that rank 0 writes, as an annotation of its job.

`vitdet.tracking.tracker.Progress` writes these lines: the step, the time left and images/s.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta

PROGRESS = "vitdet/progress"  # annotation of a job
INTERVAL = 30.0  # seconds between two updates of the annotation
LINE = re.compile(
    r"step (?P<step>\d+)/(?P<steps>\d+)  "
    r"(?:(?P<hours>\d+):)?(?P<minutes>\d+):(?P<seconds>\d\d) left  "
    r"(?P<speed>\d+\.\d+) images/s\b"
)


def parse(line: str, now: datetime) -> dict[str, int | float | str] | None:
    """Return the progress in a line of rank 0's log, or None.

    {step, steps, images_per_second, eta, time}; the times are UTC in RFC 3339. `time` is when the
    line was read and `eta` when the training run is expected to end.
    """
    found = LINE.match(line)
    if found is None:
        return None
    left = timedelta(
        hours=int(found["hours"] or 0), minutes=int(found["minutes"]), seconds=int(found["seconds"])
    )
    return {
        "step": int(found["step"]),
        "steps": int(found["steps"]),
        "images_per_second": float(found["speed"]),
        "eta": f"{now + left:%Y-%m-%dT%H:%M:%SZ}",
        "time": f"{now:%Y-%m-%dT%H:%M:%SZ}",
    }


def describe(annotation: str) -> str:
    """Return the annotation as text for users; one that this version cannot read, unchanged."""
    try:
        found = json.loads(annotation)
        return (
            f"step {found['step']}/{found['steps']}, {found['images_per_second']} images/s, "
            f"expected end {found['eta']} (as of {found['time']})"
        )
    except (ValueError, TypeError, KeyError):
        return annotation


class Progress:
    """The latest progress of one training run, and when it was published."""

    def __init__(self) -> None:
        self.latest = self.published = ""
        self.next = 0.0  # as `now` of `due`

    def read(self, line: str) -> None:
        """Remember the progress if this line has one."""
        found = parse(line, datetime.now(UTC))
        if found:
            self.latest = json.dumps(found)

    def due(self, now: float, final: bool = False) -> str:
        """Return the annotation to publish at the time `now` in seconds; "" if there is none.

        final: the job has ended, so do not wait for the interval.
        """
        if self.latest == self.published or (now < self.next and not final):
            return ""
        self.published, self.next = self.latest, now + INTERVAL
        return self.latest
