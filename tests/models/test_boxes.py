"""Box arithmetic: literal values, inverses, limits."""

import math

import pytest
import torch

from tests.helpers.small import Operations
from vitdet.models.boxes import (
    MAX_LOG_SCALE,
    area,
    clip,
    decode,
    encode,
    iou_blocks,
    nonempty,
    pairwise_iou,
)

WEIGHTS, ONES = (10.0, 10.0, 5.0, 5.0), (1.0, 1.0, 1.0, 1.0)


def random_boxes(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 100
    return torch.cat([corner, corner + 1 + torch.rand(count, 2, generator=generator) * 50], dim=1)


def test_encoding_equals_literal_values():
    found = encode(torch.tensor([[0.0, 0, 10, 20]]), torch.tensor([[5.0, 0, 25, 20]]), WEIGHTS)
    # moved by 10 px at a width of 10, then twice as wide
    assert found[0].tolist() == pytest.approx([10.0, 0.0, 5 * math.log(2), 0.0])


def test_decoding_inverts_encoding():
    boxes, targets = random_boxes(50), random_boxes(50, seed=1)
    for weights in (ONES, WEIGHTS):
        found = decode(boxes, encode(boxes, targets, weights), weights, -math.inf)
        assert torch.allclose(found, targets, atol=1e-3)


def test_decoding_accepts_a_box_per_class():
    boxes, deltas = random_boxes(3), torch.randn(3, 5, 4)
    found = decode(boxes, deltas, WEIGHTS, -math.inf)
    assert found.shape == (3, 5, 4)
    assert torch.allclose(found[:, 2], decode(boxes, deltas[:, 2], WEIGHTS, -math.inf), atol=1e-4)


@pytest.mark.parametrize(
    ("side", "deltas", "limit", "sides"),
    [
        (16, (50, 100), -math.inf, [1000, 1000]),
        (16, (-9, -9), -math.inf, [16 * math.exp(-9)] * 2),
        (1000, (-9, -1), -MAX_LOG_SCALE, [16, 1000 / math.e]),
    ],
)
def test_growth_is_always_limited_and_shrinkage_is_optionally_limited(side, deltas, limit, sides):
    box = torch.tensor([[0.0, 0, side, side]])
    (found,) = decode(box, torch.tensor([[0.0, 0, *deltas]]), ONES, limit)
    assert (found[2:] - found[:2]).tolist() == pytest.approx(sides, rel=1e-2)


def test_decoding_uses_float32_for_half_precision():
    deltas = torch.randn(2, 4).bfloat16()
    assert decode(random_boxes(2), deltas, WEIGHTS, -math.inf).dtype == torch.float32


def test_boxes_are_clipped_to_height_and_width():
    boxes = torch.tensor([[-5.0, -5, 50, 60], [10, 10, 12, 12]])
    assert clip(boxes, torch.tensor([30, 40])).tolist() == [[0, 0, 40, 30], [10, 10, 12, 12]]


def test_boxes_without_area_are_empty():
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 0, 5], [3, 3, 2, 4], [0, 2, 5, 2]])
    assert nonempty(boxes).tolist() == [True, False, False, False]
    assert nonempty(boxes[:0]).shape == (0,)
    assert area(boxes[:1]).tolist() == [1]


def test_iou_equals_counting_pixels():
    torch.manual_seed(0)
    first, second = (torch.randint(0, 6, (12, 4)).float() for _ in range(2))
    for boxes in (first, second):
        boxes[:, 2:] += boxes[:, :2]  # some with zero width or height
    found = pairwise_iou(first, second)
    for i, a in enumerate(first.int().tolist()):
        for j, b in enumerate(second.int().tolist()):
            cells = [{(x, y) for x in range(c[0], c[2]) for y in range(c[1], c[3])} for c in (a, b)]
            union = max(len(cells[0] | cells[1]), 1)
            assert found[i, j].item() == pytest.approx(len(cells[0] & cells[1]) / union)


def test_iou_without_boxes_is_empty():
    assert pairwise_iou(torch.zeros(0, 4), random_boxes(3)).shape == (0, 3)
    assert pairwise_iou(random_boxes(2), torch.zeros(0, 4)).shape == (2, 0)


@pytest.mark.parametrize(("first", "second"), [(7, 5), (0, 5), (7, 0)])
def test_iou_in_blocks_equals_the_whole_matrix(first, second, monkeypatch):
    monkeypatch.setattr("vitdet.models.boxes.PAIRS", 12)
    boxes, others = random_boxes(first), random_boxes(second)
    blocks = list(iou_blocks(boxes, others))
    assert all(block.numel() <= 12 for block in blocks) and blocks
    assert torch.equal(torch.cat(blocks), pairwise_iou(boxes, others))


@pytest.mark.parametrize("weights", [WEIGHTS, (30.0, 20.0, 15.0, 5.0)])
def test_box_weights_cause_no_device_synchronization(weights):
    boxes, targets, deltas = random_boxes(6), random_boxes(6), torch.randn(6, 3, 4)
    row = torch.tensor(weights)
    with Operations() as operations:
        found = encode(boxes, targets, weights), decode(boxes, deltas, weights, -math.inf)
    # no tensor is created from the weights
    assert not [name for name in operations.names if "copy" in name or "lift" in name]
    assert torch.equal(found[0], encode(boxes, targets, ONES) * row)
    assert torch.equal(found[1], decode(boxes, deltas / row, ONES, -math.inf))
