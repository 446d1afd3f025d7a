"""How a person sees a download."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from vitdet.tracking.tracker import clock


class Bar:
    """A download for the eye: one changing line on a terminal, a line each tenth of the file in a log."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self.name, self.stream = name, stream or sys.stderr
        self.first: tuple[float, int] | None = (
            None  # when this attempt began, and with how many bytes
        )
        self.shown = (0.0, -1)  # when the last line was shown, and its tenth

    def at(self, done: int, total: int | None) -> None:
        """So many bytes of so many are here."""
        now = time.monotonic()
        if self.first is None:
            self.first = (now, done)
        terminal, tenth = self.stream.isatty(), 10 * done // total if total else done // 100_000_000
        if done != total and (now - self.shown[0] < 0.1 if terminal else tenth == self.shown[1]):
            return
        self.shown = (now, tenth)
        text = self.text(done, total, now)
        if terminal:  # a line that the terminal breaks could not be taken back
            room = shutil.get_terminal_size().columns - 1
            width = min(room - len(text) - 4, 30)
            filled = width * done // total if total else 0
            bar = f"  [{'#' * filled}{'-' * (width - filled)}]" if total and width > 4 else ""
            text = f"\r\x1b[2K{f'{text}{bar}'[:room]}"
        self.write(text if terminal else f"{text}\n")

    def text(self, done: int, total: int | None, now: float) -> str:
        """mae_vit_b   50 %   171.6 of 343.2 MB  12.0 MB/s  0:14 left"""
        begin, had = self.first or (now, done)
        speed = (done - had) / max(now - begin, 1e-3) / 1e6
        if not total:
            return f"{self.name}  {done / 1e6:.1f} MB  {speed:.1f} MB/s"
        size = f"{total / 1e6:.1f}"
        text = f"{self.name}  {100 * done // total:3} %  {done / 1e6:{len(size)}.1f} of {size} MB"
        return text + (
            f"  {speed:.1f} MB/s  {clock((total - done) / speed / 1e6)} left" if speed else ""
        )

    def end(self) -> None:
        """No more bytes come from this attempt: the changing line ends."""
        if self.first and self.stream.isatty():
            self.write("\n")
        self.first, self.shown = None, (0.0, -1)

    def write(self, text: str) -> None:
        """At once."""
        self.stream.write(text)
        self.stream.flush()
