"""Charts of the report: bars and axis labels do not overlap, and bin edges are labelled exactly."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageFont

from vitdet.datasets.report.charts import doubling, histogram, ranges
from vitdet.datasets.report.page import LENGTHS, OBJECTS, SIDES

LETTERS = ImageFont.load_default(11)  # pixels, as the style of SVG texts in pages/style.css


@pytest.mark.parametrize("edges, borders", [(OBJECTS, False), (SIDES, True), (LENGTHS, True)])
def test_neighbours_do_not_touch(edges: tuple[int, ...], borders: bool) -> None:
    counts = [("train", np.ones(len(edges) + 1, int))]
    found = histogram("", ranges(edges), counts, "", edges if borders else ()).marks
    ends = [(x - LETTERS.getlength(said) / 2, x + LETTERS.getlength(said) / 2) for x, said in found]
    assert len(found) == len(edges) + (not borders) and ends[0][0] > 0 and ends[-1][1] < 460
    assert all(right[0] - left[1] > 8 for left, right in zip(ends, ends[1:], strict=False))


def test_an_edge_stands_between_what_is_below_and_what_is_from_it_on() -> None:
    chart = histogram(
        "", ranges((8, 16)), [("train", doubling(np.array([3, 8, 8, 20]), (8, 16)))], "", (8, 16)
    )
    (eight, _), (sixteen, _) = chart.marks
    assert [bar.tip.split(": ")[1].split()[0] for bar in chart.bars] == ["1", "2", "1"]
    ends = [(bar.x, bar.x + bar.width) for bar in chart.bars]
    assert ends[0][1] < eight < ends[1][0] < ends[1][1] < sixteen < ends[2][0]
    assert [said for _, said in chart.marks] == ["8", "16"]
