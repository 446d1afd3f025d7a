"""Anchors against literal values."""

import pytest
import torch

from tests.helpers.small import Operations
from vitdet.models.anchors import cell_anchors, grid_anchors


def test_cell_anchors_have_equal_area():
    found = cell_anchors(32.0, (0.5, 1.0, 2.0))
    wanted = [
        [-22.627417, -11.313708, 22.627417, 11.313708],
        [-16, -16, 16, 16],
        [-11.313708, -22.627417, 11.313708, 22.627417],
    ]
    assert sum(map(list, found), []) == pytest.approx(sum(wanted, []))


def test_anchors_are_centered_on_cell_corners_in_row_order():
    first, second = grid_anchors([(2, 3), (1, 2)], [4, 8], 2.0, (1.0,))
    centers = (first[:, :2] + first[:, 2:]) / 2
    assert centers.tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]
    assert (first[:, 2:] - first[:, :2]).unique().tolist() == [8]
    assert second.tolist() == [[-8, -8, 8, 8], [0, -8, 16, 8]]
    (several,) = grid_anchors([(1, 2)], [16], 8.0, (0.5, 1.0, 2.0))  # grouped by cell
    assert torch.equal(several[3:] - several[:3], torch.tensor([[16.0, 0, 16, 0]] * 3))
    assert torch.equal(several[:3, :2], -several[:3, 2:])


def test_anchors_are_made_on_the_device_without_a_copy():
    with Operations() as operations:
        levels = grid_anchors([(2, 3), (1, 2)], [4, 8], 2.0, (0.5, 1.0), "meta")
    assert [tuple(level.shape) for level in levels] == [(12, 4), (4, 4)]
    assert not [name for name in operations.names if "_to_copy" in name or "copy_" in name]
