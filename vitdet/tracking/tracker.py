"""Trackers of a training run's metrics, and the display of its progress.

On a terminal, the progress line is updated in place; otherwise, each update is a separate line.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO


class Tracker:
    """Base tracker, which records nothing; used on ranks other than 0 and without MLflow."""

    @property
    def run_id(self) -> str | None:
        """The ID with which a later process resumes this run; None if nothing is recorded."""
        return None

    def log(self, values: dict[str, float], step: int) -> None:
        """Log metrics at a step; skip those that the run already has at this or a later step."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a copy of the file to an artifact folder of the run ("": the root)."""

    def close(self, status: str = "FINISHED") -> None:
        """End the run with the status FINISHED, FAILED or KILLED."""


class Progress(Tracker):
    """A tracker that displays the metrics and passes them to another tracker.

    steps: the training run's number of steps. start: the step at which this process starts.
    """

    def __init__(
        self, tracker: Tracker, steps: int, start: int, stream: TextIO | None = None
    ) -> None:
        self.tracker, self.steps = tracker, steps
        self.stream = stream or sys.stderr
        self.begin, self.since = start, time.perf_counter()
        self.changing = False

    @property
    def run_id(self) -> str | None:
        """Run ID of the wrapped tracker."""
        return self.tracker.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        """Display the losses, images/s and remaining time, or the AP of an evaluation."""
        self.tracker.log(values, step)
        kinds = [kind for kind in ("box", "mask") if f"{kind}_ap" in values]
        if kinds:
            parts = [f"{kind} AP {values[f'{kind}_ap']:.1f}" for kind in kinds]
        else:
            losses = "  ".join(
                f"{name.removeprefix('loss_')} {value:.3f}"
                for name, value in values.items()
                if name.startswith("loss_")
            )
            pace = (time.perf_counter() - self.since) / max(step - self.begin, 1)
            parts = [
                f"{clock(pace * (self.steps - step))} left",
                f"{values['images_per_second']:.1f} images/s",
                f"loss {values['loss']:.3f} ({losses})" if losses else "all steps skipped",
            ]
        self.line("  ".join([f"step {step}/{self.steps}", *parts]), keep=bool(kinds))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Pass the file to the wrapped tracker."""
        self.tracker.artifact(path, folder)

    def close(self, status: str = "FINISHED") -> None:
        """End the progress line and close the wrapped tracker."""
        if self.changing:
            self.write("\n")
        self.changing = False
        self.tracker.close(status)

    def line(self, text: str, keep: bool) -> None:
        """Display a line. On a terminal, the next line replaces it unless `keep` is True."""
        if not self.stream.isatty():
            self.write(f"{text}\n")
            return
        if not keep:  # a wrapped line could not be overwritten
            text = text[: shutil.get_terminal_size().columns - 1]
        self.write(f"\r\x1b[2K{text}" + ("\n" if keep else ""))
        self.changing = not keep

    def write(self, text: str) -> None:
        """Write text to the stream and flush it."""
        self.stream.write(text)
        self.stream.flush()


def clock(seconds: float) -> str:
    """Format seconds: 3725 as '1:02:05', 65 as '1:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
