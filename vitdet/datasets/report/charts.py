"""Histograms: counts per bin, and positions of bars and labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT, MARGIN, FOOT = 460, 170, 6, 24  # pixels; MARGIN at the sides, FOOT below the axis
SIZE = {"width": WIDTH, "height": HEIGHT, "margin": MARGIN, "foot": FOOT}  # for the template


class Bar(NamedTuple):
    """A bar; position and size are in pixels of the chart."""

    x: float
    y: float
    width: float
    height: float
    series: int  # index of the series
    tip: str  # text of the tooltip


class Histogram(NamedTuple):
    """A chart of WIDTH x HEIGHT pixels."""

    title: str
    unit: str
    bars: list[Bar]
    marks: list[tuple[float, str]]  # center x and text of each label below the axis


def histogram(
    title: str,
    labels: Sequence[str],
    series: Sequence[tuple[str, np.ndarray]],
    unit: str,
    edges: Sequence[int] = (),
) -> Histogram:
    """Return a histogram of relative frequencies, with a bar per bin and series (name, counts).

    `edges` are written below the bin borders; if empty, `labels` are written below the bins.
    """
    shares = [counts / max(counts.sum(), 1) for _, counts in series]
    top = max((float(share.max(initial=0)) for share in shares), default=0) or 1
    step = (WIDTH - 2 * MARGIN) / max(len(labels), 1)
    width = step * 0.84 / max(len(series), 1)
    bars = []
    for index, label in enumerate(labels):
        x = MARGIN + index * step + step * 0.08
        for number, ((name, counts), share) in enumerate(zip(series, shares, strict=True)):
            height = (HEIGHT - FOOT - 14) * float(share[index]) / top
            tip = f"{name}, {label} ({unit}): {int(counts[index]):,} ({100 * share[index]:.1f}%)"
            y = HEIGHT - FOOT - height
            bars.append(Bar(x + number * width, y, width * 0.92, height, number, tip))
    positions = [(float(index), str(edge)) for index, edge in enumerate(edges, 1)]
    positions = positions or [(index + 0.5, label) for index, label in enumerate(labels)]
    marks = [(MARGIN + position * step, text) for position, text in positions]
    return Histogram(title, unit, bars, marks)


def count_bins(values: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """Return the number of values in [0, edges[0]), [edges[0], edges[1]), ..., [edges[-1], inf)."""
    bins = np.searchsorted(np.array(edges), values, side="right")
    return np.bincount(bins, minlength=len(edges) + 1)


def ranges(edges: Sequence[int]) -> list[str]:
    """Return the label of each bin of `count_bins`: a range, or the only integer in the bin."""
    pairs = zip(edges[:-1], edges[1:], strict=True)
    between = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairs]
    first = "0" if edges[0] == 1 else f"<{edges[0]}"
    return [first, *between, f"{edges[-1]}+"]
