"""Charts of the report: bars and axis labels do not overlap, and bin edges are labelled exactly."""

from __future__ import annotations

import re

import numpy as np
import pytest
from PIL import ImageFont

from vitdet.datasets.report.charts import doubling, histogram, ranges
from vitdet.datasets.report.page import LENGTHS, OBJECTS, SIDES

LETTERS = ImageFont.load_default(10.5)  # pixels, as the page's style says of SVG texts


def marks(chart: str) -> list[tuple[float, str]]:
    """Where the middle of each text lies, and what it says."""
    return [
        (float(x), said) for x, said in re.findall(r'<text x="([\d.]+)"[^>]*>([^<]*)</text>', chart)
    ]


@pytest.mark.parametrize("edges, borders", [(OBJECTS, False), (SIDES, True), (LENGTHS, True)])
def test_neighbours_do_not_touch(edges: tuple[int, ...], borders: bool) -> None:
    counts = [("train", np.ones(len(edges) + 1, int))]
    found = marks(histogram("", ranges(edges), counts, "", edges if borders else ()))
    ends = [(x - LETTERS.getlength(said) / 2, x + LETTERS.getlength(said) / 2) for x, said in found]
    assert len(found) == len(edges) + (not borders) and ends[0][0] > 0 and ends[-1][1] < 460
    assert all(right[0] - left[1] > 8 for left, right in zip(ends, ends[1:], strict=False))


def test_an_edge_stands_between_what_is_below_and_what_is_from_it_on() -> None:
    chart = histogram(
        "", ranges((8, 16)), [("train", doubling(np.array([3, 8, 8, 20]), (8, 16)))], "", (8, 16)
    )
    bars = [
        (float(x), float(wide), int(count))
        for x, wide, count in re.findall(
            r'<rect x="([\d.]+)"[^>]*width="([\d.]+)".*?: (\d+) \(', chart
        )
    ]
    (eight, _), (sixteen, _) = marks(chart)
    assert [count for _, _, count in bars] == [1, 2, 1]
    assert (
        bars[0][0] + bars[0][1]
        < eight
        < bars[1][0]
        < bars[1][0] + bars[1][1]
        < sixteen
        < bars[2][0]
    )
    assert [said for _, said in marks(chart)] == ["8", "16"]
