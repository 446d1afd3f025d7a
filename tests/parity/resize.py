"""Test-time resize, compared byte for byte."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from tests.parity.case import load
from tests.parity.report import Report
from vitdet.data.transforms import resize_longest

LONGEST = 128


def compute(folder: Path) -> dict[str, np.ndarray]:
    """Return our resize of each in{i} under the name out{i}."""
    inputs = load(folder / "io.npz", lambda name: name.startswith("in"))
    resized = {name: resize_longest(x, LONGEST, antialias=True) for name, x in inputs.items()}
    return {f"out{name.removeprefix('in')}": pixels for name, pixels in resized.items()}


def compare(folder: Path, found: dict[str, np.ndarray], report: Report) -> None:
    """Compare each out{i}."""
    stored = load(folder / "io.npz")
    for name in stored:
        if name.startswith("in"):
            report.skip(f"resize.{name}", "an input: it shows in what is made of it")
    report.table("resize", found, stored, lambda _: 0.0)
