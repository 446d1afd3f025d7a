"""Trackers of the metrics of a training run, and the display of its progress.

On a terminal, one line is updated in place; in a log, each line is printed.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TextIO


class Tracker:
    """Interface of trackers. This one records nothing, for ranks other than 0 or without MLflow."""

    @property
    def run_id(self) -> str | None:
        """The id by which a later process resumes this run; None if nothing is recorded."""
        return None

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the values of a step by name. A step that the run already has is dropped."""

    def artifact(self, path: Path, folder: str = "") -> None:
        """Log a copy of the file to this folder of the run's artifacts."""

    def close(self, status: str = "FINISHED") -> None:
        """End the run as FINISHED, FAILED or KILLED."""


class Progress(Tracker):
    """Displays the metrics and passes them to another tracker.

    steps: number of steps of the whole training run. start: the first step.
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
        """Run id of the wrapped tracker."""
        return self.tracker.run_id

    def log(self, values: dict[str, float], step: int) -> None:
        """Display losses, images/s and time left, or the AP of an evaluation."""
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
                f"loss {values['loss']:.3f} ({losses})" if losses else "every step skipped",
            ]
        self.line("  ".join([f"step {step}/{self.steps}", *parts]), keep=bool(kinds))

    def artifact(self, path: Path, folder: str = "") -> None:
        """Pass the file to the wrapped tracker."""
        self.tracker.artifact(path, folder)

    def close(self, status: str = "FINISHED") -> None:
        """End the changing line and close the wrapped tracker."""
        if self.changing:
            self.write("\n")
        self.changing = False
        self.tracker.close(status)

    def line(self, text: str, keep: bool) -> None:
        """Display a line; on a terminal it replaces the previous line, unless that line is kept."""
        if not self.stream.isatty():
            self.write(f"{text}\n")
            return
        if not keep:  # a line that the terminal wraps could not be overwritten
            text = text[: shutil.get_terminal_size().columns - 1]
        self.write(f"\r\x1b[2K{text}" + ("\n" if keep else ""))
        self.changing = not keep

    def write(self, text: str) -> None:
        """Write and flush."""
        self.stream.write(text)
        self.stream.flush()


def clock(seconds: float) -> str:
    """Format seconds: 3725 as '1:02:05', 65 as '1:05'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
