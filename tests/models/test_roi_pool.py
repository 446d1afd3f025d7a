"""RoIAlign over levels: the level rule, and the matrix products against torchvision."""

import pytest
import torch
from torchvision.ops import roi_align

from tests.helpers.small import Operations
from vitdet.models.roi_pool import assign_levels, pool

STRIDES = (4, 8, 16, 32)


def maps(count=2, side=128, channels=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(count, channels, side // stride, side // stride) for stride in STRIDES]
    return [torch.randn(size, generator=generator, requires_grad=True) for size in sizes]


def pool_images(features, boxes, strides, bins, ratio):
    """Call `pool` with one tensor of boxes per image."""
    image = torch.tensor([number for number, rows in enumerate(boxes) for _ in rows]).long()
    return pool(features, torch.cat(boxes), image, strides, bins, ratio)


def slow_pool(features, boxes, bins, ratio):
    """Pool each RoI with torchvision."""
    levels = assign_levels(torch.cat(boxes), 4, 4).tolist()
    images = [i for i, b in enumerate(boxes) for _ in b]
    rows = []
    for level, i, box in zip(levels, images, torch.cat(boxes), strict=True):
        level_map, scale = features[level][i : i + 1], 1 / STRIDES[level]
        rows.append(roi_align(level_map, [box[None]], bins, scale, ratio, aligned=True))
    return torch.cat(rows)


FIRST = [[10.0, 10, 40, 30], [0, 0, 128, 128], [-6, -6, 3, 3], [120, 100, 140, 160]]
LAST = [[0.0, 0, 512, 512], [0, 0, 600, 700], [64, 64, 64, 64], [-40, -40, -20, -20]]
BOXES = [
    torch.tensor([*FIRST, [5.2, 7.7, 5.9, 90.1]]),
    torch.zeros(0, 4),
    torch.tensor([*LAST, [3, 5, 120, 126]]),
]


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
@pytest.mark.parametrize("bins", [7, 14])
def test_pooling_equals_torchvision_in_values_and_gradients(ratio, bins):
    """Without a sampling ratio, the values are bitwise equal; each level writes its rows once."""
    ours, theirs = maps(3), maps(3)
    with Operations() as operations:
        found = pool_images(ours, BOXES, STRIDES, bins, ratio)
    wanted = slow_pool(theirs, BOXES, bins, ratio)
    assert found.shape == (10, 3, bins, bins)
    if ratio:
        assert torch.allclose(found, wanted, atol=1e-5)
    else:
        assert torch.equal(found, wanted)
        assert not [name for name in operations.names if "index_put" in name]
    weight = torch.randn(found.shape, generator=torch.Generator().manual_seed(1))
    (found * weight).sum().backward()
    (wanted * weight).sum().backward()
    for pair in zip(ours, theirs, strict=True):
        a, b = (torch.zeros_like(tensor) if tensor.grad is None else tensor.grad for tensor in pair)
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("ratio", [0, 2])
def test_empty_slots_keep_their_rows_and_stay_finite(ratio):
    """Empty slots are pooled even without kernels, and there may be no boxes."""
    boxes = torch.tensor([[0.0, 0, 0, 0], [8, 8, 40, 40], [0, 0, 0, 0]])
    found = pool(maps(), boxes, torch.tensor([-1, 1, -1]), STRIDES, 7, ratio)
    alone = pool(maps(), boxes[1:2], torch.tensor([1]), STRIDES, 7, ratio)
    assert len(found) == 3 and found.isfinite().all()
    assert pool(maps(), boxes[:0], torch.zeros(0).long(), STRIDES, 7, ratio).shape == (0, 3, 7, 7)
    torch.testing.assert_close(found[1:2], alone)


def test_levels_without_a_stride_are_ignored():
    features = [*maps(), torch.full((2, 3, 2, 2), float("nan"))]
    boxes = [torch.tensor([[0.0, 0, 900, 900]]), torch.zeros(0, 4)]
    assert pool_images(features, boxes, STRIDES, 7, 2).isfinite().all()


def test_levels_change_at_powers_of_two():
    sides = torch.tensor([1.0, 111.9, 112, 223.9, 224, 447.9, 448, 5000])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), sides, sides], dim=1)
    assert assign_levels(boxes, 4, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    wide = torch.tensor([[0.0, 0, 224 * 4, 224 / 4]])
    assert assign_levels(wide, 4, 4).tolist() == [2]  # the area determines the level
    assert assign_levels(torch.zeros(1, 4), 4, 4).tolist() == [0]
