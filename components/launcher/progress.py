"""The progress of a training run: parsed from rank 0's log, published as an annotation of the job.

`vitdet.tracking.tracker.Progress` writes log lines with the step, the time left and images/s.
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

    The progress is {step, steps, images_per_second, eta, time}. `time` is when the line was read,
    `eta` the expected end of the training run; both are UTC in RFC 3339 format.
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
    """Return the annotation as text for users, unchanged if it cannot be parsed."""
    try:
        found = json.loads(annotation)
        return (
            f"step {found['step']}/{found['steps']}, {found['images_per_second']} images/s, "
            f"expected end {found['eta']} (as of {found['time']})"
        )
    except (ValueError, TypeError, KeyError):
        return annotation


class Progress:
    """The latest progress of one training run, and the progress that was published last."""

    def __init__(self) -> None:
        self.latest = self.published = ""
        self.next = 0.0  # earliest time of the next publication, on the clock of `now` in `due`

    def read(self, line: str) -> None:
        """Store the progress if this line reports it."""
        found = parse(line, datetime.now(UTC))
        if found:
            self.latest = json.dumps(found)

    def due(self, now: float, final: bool = False) -> str:
        """Return the annotation to publish at the time `now` in seconds; "" if there is none.

        final: whether the job has ended; if so, INTERVAL is ignored.
        """
        if self.latest == self.published or (now < self.next and not final):
            return ""
        self.published, self.next = self.latest, now + INTERVAL
        return self.latest
