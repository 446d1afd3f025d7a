"""The mask head and its targets: outlines and bitmaps cropped to a box."""

import numpy as np
import pytest
import torch
from pycocotools import mask as rle
from torch.nn import functional as F

from tests.helpers.parts import mask_head
from tests.helpers.small import SIDE, polygons, rectangle, target
from tests.models.test_box_head import slow_block
from tests.parity.bitmaps import crop_bitmaps
from vitdet.models.mask_head import SIZE, mask_targets, rasterize
from vitdet.types import Polygons


def star(center, radius, points, generator):
    """Return the vertices (P, 2) of a star-shaped polygon."""
    angles = torch.sort(torch.rand(points, generator=generator) * 2 * torch.pi).values
    radii = radius * (0.3 + 0.7 * torch.rand(points, generator=generator))
    return torch.stack([center + radii * angles.cos(), center + radii * angles.sin()], dim=1)


def outline(corners):
    return torch.cat([corners, corners.roll(-1, dims=0)], dim=1)


def slow_inside(edges, x, y):
    """Return whether the edges' winding number around a point is nonzero."""
    winding = 0
    for x0, y0, x1, y1 in edges.tolist():
        side = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
        if y0 <= y < y1 and side > 0:
            winding += 1
        elif y1 <= y < y0 and side < 0:
            winding -= 1
    return winding != 0


def random_outlines(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [star(32.0, 28.0, 9, generator) for _ in range(count)]


def test_padded_outlines_give_the_same_masks() -> None:
    squares = [rectangle(2, 2, 10, 12), rectangle(0, 0, 5, 5)]
    padded = torch.stack([torch.cat([square, torch.zeros(3, 4)]) for square in squares])
    ragged = Polygons.of(torch.cat(squares), torch.tensor([4, 4]))
    boxes = torch.tensor([[0.0, 0.0, 12.0, 12.0]] * 2)
    assert torch.equal(mask_targets(Polygons(padded), boxes), mask_targets(ragged, boxes))
    index, again = torch.tensor([1, 1, 0]), boxes[:1].expand(3, 4)
    moved = Polygons(padded)[index].to("cpu")
    assert torch.equal(mask_targets(moved, again), mask_targets(ragged[index], again))


def test_rasterizing_equals_a_point_in_polygon_test():
    corners = random_outlines(6)
    two_parts = torch.cat([outline(corners[0]), outline(corners[1] + 9.3)])
    outlines = [two_parts, *(outline(c) for c in corners[2:])]
    boxes = [[2.3, 1.9, 70.1, 66.6], [0.0, 0, 64, 64], [20.4, 20.2, 41.3, 55.5]]
    boxes += [[-9.2, 5, 30.1, 90.3], [31.1, 30.9, 34.3, 33.2]]
    found = rasterize(polygons(outlines), torch.tensor(boxes), 28)
    for lines, (x0, y0, x1, y1), cells in zip(outlines, boxes, found, strict=True):
        columns = [x0 + (j + 0.5) * (x1 - x0) / 28 for j in range(28)]
        rows = [y0 + (i + 0.5) * (y1 - y0) / 28 for i in range(28)]
        wanted = [[slow_inside(lines, x, y) for x in columns] for y in rows]
        # a center may be on an edge, where rounding decides
        assert (cells != torch.tensor(wanted)).sum() <= 1


def test_rasterizing_agrees_with_pycocotools():
    corners = random_outlines(12, seed=3)
    boxes = torch.tensor([[0.0, 0, 64, 64]] * 12)
    found = rasterize(polygons([outline(c) for c in corners]), boxes, 64)
    overlaps = []
    for mine, c in zip(found, corners, strict=True):
        theirs = rle.decode(rle.merge(rle.frPyObjects([c.flatten().tolist()], 64, 64))).astype(bool)
        overlaps.append((mine.numpy() & theirs).sum() / (mine.numpy() | theirs).sum())
    assert np.mean(overlaps) > 0.96


def test_a_rectangle_is_rasterized_to_literal_values():
    found = rasterize(polygons([rectangle(2, 1, 4, 3)]), torch.tensor([[0.0, 0, 4, 4]]), 4)
    assert found[0].int().tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]]


@pytest.mark.parametrize("count", [1, 3])
def test_overlapping_parts_are_united(count):
    lines = torch.cat([rectangle(0, 0, 3, 3)] * count + [rectangle(2, 2, 4, 4)])
    found = rasterize(polygons([lines]), torch.tensor([[0.0, 0, 4, 4]]), 4)[0].int().tolist()
    assert found == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 1]]


def test_a_hole_has_the_opposite_orientation():
    hole = rectangle(1, 1, 3, 3)[:, [2, 3, 0, 1]]
    lines = torch.cat([rectangle(0, 0, 4, 4), hole])
    found = rasterize(polygons([lines]), torch.tensor([[0.0, 0, 4, 4]]), 4)
    assert found[0].sum() == 12 and not found[0, 1:3, 1:3].any()


def test_outlines_may_be_empty_or_outside_the_box():
    def cells(lines, *box):
        return rasterize(polygons([lines]), torch.tensor([[float(number) for number in box]]), 28)

    assert not cells(rectangle(10, 10, 20, 20), 30, 30, 40, 40).any()
    assert not cells(torch.zeros(6, 4), 0, 0, 9, 9).any()
    assert cells(rectangle(0, 0, 50, 50), 10, 10, 20, 20).all()
    assert cells(rectangle(0, 0, 9, 9), 5, 5, 5, 5).shape == (1, 28, 28)
    assert rasterize(polygons([]), torch.zeros(0, 4), 28).shape == (0, 28, 28)


@pytest.mark.parametrize("pairs", [1, 7, 64, 1000])
def test_edges_are_processed_in_blocks_of_any_size(pairs, monkeypatch):
    """The outlines differ greatly in length, one has no edge, and two RoIs share an outline."""
    generator = torch.Generator().manual_seed(5)
    lines = [outline(star(32.0, 28.0, count, generator)) for count in (3, 90, 12)]
    lines.insert(1, torch.zeros(0, 4))
    truth = torch.tensor([2, 1, 0, 3, 2])
    boxes = torch.rand(5, 4, generator=generator) * 20
    boxes[:, 2:] += boxes[:, :2] + 20
    wanted = [rasterize(polygons([lines[i]]), boxes[[n]], 28) for n, i in enumerate(truth)]
    monkeypatch.setattr("vitdet.models.mask_head.PAIRS", pairs)
    found = rasterize(polygons(lines)[truth], boxes, 28)
    assert torch.equal(found, torch.cat(wanted))
    assert found[0].any() and found[3].any() and not found[1].any()


def test_bitmaps_and_outlines_of_the_same_rectangles_agree():
    boxes = [[10, 20, 60, 90], [0, 0, 128, 128], [100, 3, 104, 9]]
    around = torch.tensor([[5.0, 10, 70, 100], [20, 20, 90, 70], [98, 0, 110, 12]])
    pixels = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    for bitmap, (x0, y0, x1, y1) in zip(pixels, boxes, strict=True):
        bitmap[y0:y1, x0:x1] = True
    outlines = target(boxes, [0, 1, 2]).masks
    differing = mask_targets(outlines, around) != crop_bitmaps(pixels, around, SIZE)
    assert differing.float().mean() < 0.02


def test_a_bitmap_is_averaged_over_each_cell():
    pixels = torch.zeros(1, 8, 8, dtype=torch.bool)
    pixels[0, :, :3] = True
    found = crop_bitmaps(pixels, torch.tensor([[0.0, 0, 8, 8]]), 4)
    assert found[0, 0].tolist() == [True, True, False, False]
    assert crop_bitmaps(pixels[:0], torch.zeros(0, 4), 4).shape == (0, 4, 4)


def test_the_head_returns_the_mask_of_the_given_class():
    torch.manual_seed(0)
    head = mask_head(channels=8, num_convs=1, num_classes=3)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    pooled = torch.randn(1, 8, 14, 14).expand(3, -1, -1, -1)
    found = head(pooled, torch.tensor([2, 0, 2]))
    assert found.shape == (3, 28, 28)
    assert torch.allclose(found[0], found[2]) and not torch.allclose(found[0], found[1])
    assert head(pooled[:0], torch.zeros(0, dtype=torch.long)).shape == (0, 28, 28)


@pytest.mark.parametrize("norm", [True, False])
def test_the_head_equals_its_layers_one_by_one(norm):
    torch.manual_seed(0)
    head = mask_head(channels=4, num_convs=2, num_classes=3, norm=norm, eps=0.1)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    hidden = pooled = torch.randn(2, 4, 14, 14)
    for block in head.convs:
        assert (block.conv.bias is None) == norm
        hidden = slow_block(block, hidden, 0.1)
    hidden = F.conv_transpose2d(hidden, head.deconv.weight, head.deconv.bias, stride=2).clamp(min=0)
    wanted = F.conv2d(hidden, head.logits.weight, head.logits.bias)
    found = head(pooled, torch.tensor([2, 0]))
    own, exact = torch.stack([wanted[0, 2], wanted[1, 0]]), 1e-5 * wanted.abs().max().item()
    assert torch.allclose(found, own, atol=exact)
