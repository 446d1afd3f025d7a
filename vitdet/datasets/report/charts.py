"""Histograms of counts: bins, and where bars and labels are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

WIDTH, HEIGHT, MARGIN, FOOT = 460, 170, 6, 24  # pixels of a histogram, at its sides, below the axis
SIZE = {"width": WIDTH, "height": HEIGHT, "margin": MARGIN, "foot": FOOT}  # for the template


class Bar(NamedTuple):
    """A bar in pixels of the chart; series: index of its series; tip: its counts as text."""

    x: float
    y: float
    width: float
    height: float
    series: int
    tip: str


class Histogram(NamedTuple):
    """A chart of WIDTH x HEIGHT pixels; marks: (x of the middle, text) below the axis."""

    title: str
    unit: str
    bars: list[Bar]
    marks: list[tuple[float, str]]


def histogram(
    title: str,
    labels: Sequence[str],
    series: Sequence[tuple[str, np.ndarray]],
    unit: str,
    edges: Sequence[int] = (),
) -> Histogram:
    """Return the bars of a histogram of shares; each series (name, counts per bin) has one bar per
    bin.

    edges: numbers to write below the borders of the bins, instead of the labels below the bins.
    """
    shares = [counts / max(counts.sum(), 1) for _, counts in series]
    top = max((float(share.max(initial=0)) for share in shares), default=0) or 1
    step = (WIDTH - 2 * MARGIN) / max(len(labels), 1)
    width = step * 0.84 / max(len(series), 1)
    bars = []
    for place, label in enumerate(labels):
        x = MARGIN + place * step + step * 0.08
        for number, ((name, counts), one) in enumerate(zip(series, shares, strict=True)):
            height = (HEIGHT - FOOT - 14) * float(one[place]) / top
            tip = f"{name}, {label} {unit}: {int(counts[place]):,} ({100 * one[place]:.1f}%)"
            y = HEIGHT - FOOT - height
            bars.append(Bar(x + number * width, y, width * 0.92, height, number, tip))
    places = [(float(place), str(edge)) for place, edge in enumerate(edges, 1)]
    places = places or [(place + 0.5, label) for place, label in enumerate(labels)]
    marks = [(MARGIN + place * step, text) for place, text in places]
    return Histogram(title, unit, bars, marks)


def doubling(values: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """Return the number of values in each bin: below edges[0], below edges[1], ..., the others."""
    places = np.searchsorted(np.array(edges), values, side="right")
    return np.bincount(places, minlength=len(edges) + 1)


def ranges(edges: Sequence[int]) -> list[str]:
    """Return the labels of the bins of `doubling`; a bin of one integer is labeled with it."""
    pairs = zip(edges[:-1], edges[1:], strict=True)
    between = [str(low) if high == low + 1 else f"{low}-{high - 1}" for low, high in pairs]
    first = "0" if edges[0] == 1 else f"<{edges[0]}"
    return [first, *between, f"{edges[-1]}+"]
