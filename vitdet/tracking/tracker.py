"""Where the figures of a training go, and what a person sees of them: one line that changes on a terminal, plain
lines in a log.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO


class Tracker:
    """Where the figures of a training go; this one keeps nothing: for ranks other than 0, and without MLflow."""

    @property
    def run_id(self) -> str | None:
        """The id under which a later process continues this run; None where nothing is recorded."""
        return None

    def log(self, values: dict[str, float], step: int) -> None:
        """Values of this step, by name; the steps of a name rise, and one that the run already has is dropped."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """A copy of the file, for this folder of the run's artifacts."""

    def close(self, status: str = "FINISHED") -> None:
        """Ends the run as FINISHED, FAILED or KILLED."""


class Progress(Tracker):
    """A tracker that shows the figures and passes them on. `steps` is the length of the training."""

    def __init__(
        self, tracker: Tracker, steps: int, start: int, stream: TextIO | None = None
    ) -> None:
        self.tracker, self.steps = tracker, steps
        self.stream = stream or sys.stderr
        self.begin, self.since = start, time.perf_counter()
        self.changing = False

    @property
    def run_id(self) -> str | None:
        """That of the tracker behind."""
        return self.tracker.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        """Shows losses, images/s and time left, or an evaluation's AP."""
        self.tracker.log(values, step)
        if "box_ap" in values:
            kinds = [
                f"{kind} AP {values[f'{kind}_ap']:.1f}"
                for kind in ("box", "mask")
                if f"{kind}_ap" in values
            ]
            self.line(f"step {step}/{self.steps}  {'  '.join(kinds)}", keep=True)
            return
        losses = "  ".join(
            f"{name.removeprefix('loss_')} {value:.3f}"
            for name, value in values.items()
            if name.startswith("loss_")
        )
        shown = f"loss {values['loss']:.3f} ({losses})" if losses else "every step skipped"
        left = (time.perf_counter() - self.since) / max(step - self.begin, 1) * (self.steps - step)
        self.line(
            f"step {step}/{self.steps}  {clock(left)} left  {values['images_per_second']:.1f} images/s  "
            f"{shown}",
            keep=False,
        )

    def artifact(self, path: Path, folder: str = "") -> None:
        """Passed on."""
        self.tracker.artifact(path, folder)

    def close(self, status: str = "FINISHED") -> None:
        """Passed on; the changing line ends."""
        if self.changing:
            self.write("\n")
        self.changing = False
        self.tracker.close(status)

    def line(self, text: str, keep: bool) -> None:
        """Shows a line: on a terminal in the place of the one before, unless that is to be kept."""
        if not self.stream.isatty():
            self.write(f"{text}\n")
            return
        if not keep:  # a line that the terminal breaks could not be taken back
            text = text[: shutil.get_terminal_size().columns - 1]
        self.write(f"\r\x1b[2K{text}" + ("\n" if keep else ""))
        self.changing = not keep

    def write(self, text: str) -> None:
        """At once."""
        self.stream.write(text)
        self.stream.flush()


def clock(seconds: float) -> str:
    """3725 -> '1:02:05', 65 -> '1:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
