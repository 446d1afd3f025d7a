"""Conversion of outlines to pixels and back."""

from __future__ import annotations

import math

import numpy as np

from vitdet.data.outlines import fill, signed_area, trace


def inside(vertices: np.ndarray, x: float, y: float) -> bool:
    """Test one point by the even-odd rule in a loop over edges."""
    crossings = 0
    for (x0, y0), (x1, y1) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        if (y0 <= y) != (y1 <= y):
            crossings += x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x
    return crossings % 2 == 1


def test_fill_tests_every_pixel_center_even_of_cropped_outlines() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        vertices = rng.random((7, 2)) * [30, 24] - 6
        expected = [[inside(vertices, j + 0.5, i + 0.5) for j in range(18)] for i in range(12)]
        assert (fill(vertices, 12, 18) == expected).all()
    assert fill(np.array([[-9.0, -9], [-2, -9], [-2, -2]]), 5, 5).sum() == 0


def test_filled_traces_cover_the_bitmap() -> None:
    rng = np.random.default_rng(1)
    for _ in range(10):
        bitmap = np.zeros((20, 30), dtype=bool)
        rows, columns = rng.integers((0, 10), (9, 20)), rng.integers((0, 15), (14, 30))
        bitmap[slice(*rows), slice(*columns)] = True
        bitmap[4:12, 7:9] = False
        [parts] = trace([bitmap], 0.0)
        assert all(signed_area(part) > 0 for part in parts)
        filled = np.any([fill(part, 20, 30) for part in parts], axis=0)
        # a gap in the middle may be a hole, which is filled
        assert (filled | bitmap == filled).all()


def test_pixels_connected_by_a_corner_are_two_parts() -> None:
    [parts, nothing] = trace([np.eye(2, dtype=bool), np.zeros((3, 4), dtype=bool)], 0.0)
    assert len(parts) == 2 and nothing == []
    assert sorted(part.min(axis=0).tolist() for part in parts) == [[0, 0], [1, 1]]


def test_holes_are_filled() -> None:
    bitmap = np.ones((7, 7), dtype=bool)
    bitmap[3, 3] = False
    [[part]] = trace([bitmap], 0.3)
    assert fill(part, 7, 7).all()


def test_a_traced_disc_is_round_with_few_vertices() -> None:
    angle = np.arange(200) * (2 * math.pi / 200)
    circle = np.stack([40 + 30 * np.cos(angle), 40 + 30 * np.sin(angle)], axis=1)
    [[part]] = trace([fill(circle, 80, 80)], 0.9)
    assert len(part) <= 40
    assert np.abs(np.hypot(*(part - 40).T) - 30).max() < 1
    assert abs(signed_area(part) / (math.pi * 900) - 1) < 0.03
