"""Progress bar of a download."""

from __future__ import annotations

import shutil
import sys
import time
from typing import TextIO

from vitdet.tracking.tracker import clock


class Bar:
    """Redraws one line on a terminal, else prints a line every 10% (100 MB if size is unknown)."""

    def __init__(self, name: str, stream: TextIO | None = None) -> None:
        self.name, self.stream = name, stream or sys.stderr
        self._first: tuple[float, int] | None = None  # time and bytes at the start of this attempt
        self._shown = (0.0, -1)  # time of the last line, and its progress in units of 10% or 100 MB

    def at(self, done: int, total: int | None) -> None:
        """Show that `done` of `total` bytes have been downloaded; total=None: unknown size."""
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        terminal, tenth = self.stream.isatty(), 10 * done // total if total else done // 100_000_000
        recent = now - self._shown[0] < 0.1 if terminal else tenth == self._shown[1]
        if recent and done != total:
            return
        self._shown = (now, tenth)
        text = self._text(done, total, now)
        if terminal:  # a line that wraps could not be redrawn
            room = shutil.get_terminal_size().columns - 1
            width = min(room - len(text) - 4, 30)
            filled = width * done // total if total else 0
            bar = f"  [{'#' * filled}{'-' * (width - filled)}]" if total and width > 4 else ""
            self._write(f"\r\x1b[2K{f'{text}{bar}'[:room]}")
        else:
            self._write(f"{text}\n")

    def _text(self, done: int, total: int | None, now: float) -> str:
        """Return, e.g., `mae_vit_b   50%   171.6 of 343.2 MB  12.0 MB/s  0:14 left`."""
        begin, had = self._first or (now, done)
        speed = (done - had) / max(now - begin, 1e-3) / 1e6
        if not total:
            return f"{self.name}  {done / 1e6:.1f} MB  {speed:.1f} MB/s"
        size = f"{total / 1e6:.1f}"
        left = f"  {speed:.1f} MB/s  {clock((total - done) / speed / 1e6)} left" if speed else ""
        share = f"{100 * done // total:3}%  {done / 1e6:{len(size)}.1f} of {size} MB"
        return f"{self.name}  {share}{left}"

    def end(self) -> None:
        """End the line of this download attempt and prepare for the next attempt."""
        if self._first and self.stream.isatty():
            self._write("\n")
        self._first, self._shown = None, (0.0, -1)

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()
