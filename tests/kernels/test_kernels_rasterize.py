"""Outlines rasterized within boxes: the Triton kernel against the plain path."""

import math

import pytest
import torch

from tests.helpers.triton_device import DEVICE, REGISTRATION, needs_gpu, needs_triton, no_waits
from vitdet.kernels.rasterize import rasterize
from vitdet.models.mask_head import rasterize as plain
from vitdet.types import Polygons


def ring(points, center, radius, seed):
    """Return a closed outline (points, 4) with corners at random distances, many on pixel borders."""
    draw = torch.Generator().manual_seed(seed)
    angle = torch.arange(points) * (2 * math.pi / points)
    far = radius * (0.4 + 0.6 * torch.rand(points, generator=draw))
    corners = torch.stack([center + far * angle.cos(), center + far * angle.sin()], dim=1)
    corners[::3] = corners[::3].round()
    return torch.cat([corners, corners.roll(-1, 0)], dim=1)


def scene(counts, rois):
    outlines = [ring(count, 40.0, 30.0, seed) for seed, count in enumerate(counts)]
    masks = Polygons.of(torch.cat(outlines), torch.tensor(counts))
    draw = torch.Generator().manual_seed(1)
    low = torch.rand(rois, 2, generator=draw) * 50
    boxes = torch.cat([low, low + torch.rand(rois, 2, generator=draw) * 60], dim=1)
    boxes[::4] = boxes[::4].round()
    boxes[1, 2:] = boxes[1, :2]  # empty box
    return masks[torch.arange(rois) % len(counts)], boxes


def on(device, masks, boxes, size):
    return masks.edges.to(device), masks.spans.to(device), boxes.to(device), size


@needs_triton
@pytest.mark.parametrize("size", [5, 9])
def test_the_kernel_marks_the_same_cells_as_the_plain_path(size):
    masks, boxes = scene([3, 40, 150], 6)
    masks.spans[4] = torch.tensor([5, 5])  # an object without an outline
    found = rasterize(*on(DEVICE, masks, boxes, size)).cpu()
    assert torch.equal(found, plain(masks, boxes, size))
    assert found.any() and not found[4].any()


@needs_triton
def test_parts_unite_and_holes_stay_open():
    square = torch.tensor([[0.0, 0, 0, 8], [0, 8, 8, 8], [8, 8, 8, 0], [8, 0, 0, 0]])
    hole = (square / 2 + 2)[:, [2, 3, 0, 1]]
    masks = Polygons.of(torch.cat([square, square + 4, square, hole]), torch.tensor([8, 8]))
    boxes = torch.tensor([[0.0, 0, 12, 12], [0, 0, 8, 8]])
    assert torch.equal(rasterize(*on(DEVICE, masks, boxes, 12)).cpu(), plain(masks, boxes, 12))


@needs_triton
def test_zero_rois_and_zero_edges_are_accepted():
    none = torch.zeros(0, 4, device=DEVICE)
    spans = torch.zeros(0, 2, dtype=torch.long, device=DEVICE)
    assert rasterize(none, spans, none, 28).shape == (0, 28, 28)
    two = torch.zeros(2, 2, dtype=torch.long, device=DEVICE)
    assert not rasterize(none, two, torch.ones(2, 4, device=DEVICE), 4).any()


@needs_triton
def test_the_operator_passes_opcheck():
    masks, boxes = scene([5], 2)
    torch.library.opcheck(rasterize, on(DEVICE, masks, boxes, 4), test_utils=REGISTRATION)


@needs_gpu
@pytest.mark.cuda
def test_results_at_full_size_equal_the_plain_path():
    masks, boxes = scene([60] * 30 + [187_000, 1], 1024)
    found = rasterize(*on("cuda", masks, boxes, 28))
    few = torch.cat([torch.arange(64), torch.arange(30, 1024, 256)])
    assert torch.equal(found.cpu()[few], plain(masks[few], boxes[few], 28))
    on_gpu = plain(masks[few].to("cuda"), boxes[few].cuda(), 28)
    assert torch.equal(found[few.cuda()], on_gpu)


@needs_gpu
@pytest.mark.cuda
def test_no_operation_synchronizes_with_the_gpu():
    inputs = on("cuda", *scene([60] * 8, 128), 28)
    rasterize(*inputs)  # compiles the kernel
    with no_waits():
        rasterize(*inputs)
