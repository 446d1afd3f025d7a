"""Test-time resize: equal to the byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.parity.case import load
from tests.parity.report import Report
from vitdet.data.transforms import resize_longest

LONGEST = 128


def compute(folder: Path) -> dict[str, np.ndarray]:
    """Our resize of each in{i}, by the name out{i}."""
    inputs = load(folder / "io.npz", lambda name: name.startswith("in"))
    return {
        f"out{name.removeprefix('in')}": resize_longest(pixels, LONGEST, antialias=True)
        for name, pixels in inputs.items()
    }


def compare(folder: Path, found: dict[str, np.ndarray], report: Report) -> None:
    """Compares each out{i}."""
    stored = load(folder / "io.npz")
    for name in stored:
        if name.startswith("in"):
            report.skip(f"resize.{name}", "an input: it shows in what is made of it")
    for name, ours in found.items():
        if name in stored:
            report.equal(f"resize.{name}", ours, stored[name])
        else:
            report.out(f"resize.{name}", "no stored output belongs to its input")
    report.all_seen([f"resize.{name}" for name in stored])
