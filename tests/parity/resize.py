"""Test-time resize: equal to the byte."""

from __future__ import annotations

from pathlib import Path

from tests.parity.detector import load
from tests.parity.report import Report
from vitdet.data.transforms import resize_longest

LONGEST = 128


def check(folder: Path, report: Report) -> None:
    """Compares out{i} with our resize of in{i}."""
    stored = load(folder / "io.npz")
    for name in stored:
        if name.startswith("in"):
            report.skip(f"resize.{name}", "an input")
            theirs = stored.get(f"out{name.removeprefix('in')}")
            ours = resize_longest(stored[name], LONGEST)
            if theirs is None:
                report.out(f"resize.{name}", "no stored output belongs to it")
            else:
                report.equal(f"resize.out{name.removeprefix('in')}", ours, theirs)
    report.all_seen([f"resize.{name}" for name in stored])
