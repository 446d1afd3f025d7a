"""The region proposal network: order of anchors, proposals, and its losses."""

import math

import pytest
import torch

from tests.helpers import parts
from tests.helpers.small import target
from tests.models.test_box_head import slow_block
from tests.parity.detector import by_image
from vitdet.models.boxes import pairwise_iou
from vitdet.models.rpn import Anchored
from vitdet.types import Targets

STRIDES = (8, 16)
SIZES = torch.tensor([[64, 64], [40, 50]])


def small_rpn(samples=16, **settings):
    torch.manual_seed(0)
    rpn = parts.rpn(channels=4, strides=STRIDES, anchor_scale=3.0, samples=samples, **settings)
    for parameter in rpn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return rpn


def features(seed=1):
    generator = torch.Generator().manual_seed(seed)
    sizes = [(2, 4, 64 // stride, 64 // stride) for stride in STRIDES]
    return [torch.randn(size, generator=generator) for size in sizes]


def test_maps_are_flattened_by_row_then_column_then_anchor():
    rpn, maps = small_rpn(), features()
    found = rpn(maps)
    logits, deltas = rpn.head(maps[0])
    row, column, anchor = 3, 5, 2
    index = (row * 8 + column) * 3 + anchor
    assert found.logits[0][1, index] == logits[1, anchor, row, column]
    of_anchor = deltas[1, 4 * anchor : 4 * anchor + 4, row, column]
    assert torch.equal(found.deltas[0][1, index], of_anchor)
    center = found.anchors[0][index].view(2, 2).mean(dim=0)
    assert center.tolist() == pytest.approx([40, 24])


def test_proposals_are_sorted_clipped_and_limited():
    rpn = small_rpn()
    images = by_image(rpn.propose(rpn(features()), SIZES, (40, 25)))
    for proposals, (height, width) in zip(images, SIZES.tolist(), strict=True):
        boxes = proposals.boxes
        assert 0 < len(boxes) <= 25 and not boxes.requires_grad
        assert (proposals.logits.diff() <= 0).all()
        assert (boxes >= 0).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert (boxes[:, 0::2] <= width).all() and (boxes[:, 1::2] <= height).all()


def one_level(boxes, logits):
    boxes = torch.tensor(boxes)
    return [torch.tensor([logits])], [torch.zeros(1, len(boxes), 4)], [boxes]


def test_nms_compares_only_boxes_of_the_same_level():
    box = [[10.0, 10, 30, 30], [11.0, 10, 31, 30]]
    first, second = one_level(box, [1.0, 2.0]), one_level(box, [0.5, 3.0])
    found = Anchored(*(a + b for a, b in zip(first, second, strict=True)))
    (proposals,) = by_image(small_rpn().propose(found, SIZES[:1], (10, 10)))
    assert proposals.logits.tolist() == [3.0, 2.0]


def test_only_the_best_boxes_of_a_level_enter_nms_and_invalid_boxes_are_removed():
    far = [[0.0, 0, 8, 8], [20, 20, 30, 30], [40, 40, 50, 50], [70, 70, 90, 90]]
    found = Anchored(*one_level(far, [1.0, 3.0, float("nan"), 2.0]))
    found.deltas[0][0, 1] = float("inf")
    (proposals,) = by_image(small_rpn().propose(found, SIZES[:1], (4, 10)))
    # removed: an infinite box, a NaN logit, and a box outside the image
    assert proposals.boxes.tolist() == [[0, 0, 8, 8]]
    found = Anchored(*one_level(far, [1.0, 3.0, 0.0, 2.0]))
    (proposals,) = by_image(small_rpn().propose(found, SIZES[:1], (2, 10)))
    assert proposals.logits.tolist() == [3.0]


@pytest.mark.parametrize("values", [1, 3])
@pytest.mark.parametrize("enter", [150, 200])
def test_equal_logits_keep_the_order_of_anchors(values, enter):
    """bf16 produces many equal logits; this level has 200 anchors without overlap."""
    corners = [(3.0 * (i % 20), 3.0 * (i // 20)) for i in range(200)]
    boxes = [[x, y, x + 2, y + 2] for x, y in corners]
    logits = [float(i * 7 % values) for i in range(200)]
    found = Anchored(*one_level(boxes, logits))
    (proposals,) = by_image(small_rpn().propose(found, SIZES[:1], (enter, 200)))
    assert len(proposals.boxes) == enter
    place = [boxes.index(box) for box in proposals.boxes.tolist()]
    assert place == sorted(place, key=lambda i: (-logits[i], i))


def filled(found, delta):
    """Return zero logits and constant deltas."""
    logits = [torch.zeros_like(part) for part in found.logits]
    return Anchored(logits, [torch.full_like(part, delta) for part in found.deltas], found.anchors)


def test_losses_are_divided_by_samples_and_images():
    rpn = small_rpn(samples=8)
    found = rpn(features())
    zeros = filled(found, 0)
    nothing = target([], [])
    losses = rpn.losses(zeros, Targets.of([nothing, nothing]))
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2))  # 8 negatives per image
    assert losses["loss_rpn_loc"].item() == 0
    exact = target([found.anchors[0][50].tolist()], [0])
    losses = rpn.losses(zeros, Targets.of([exact, nothing]))
    assert losses["loss_rpn_cls"].item() == pytest.approx(math.log(2))
    assert losses["loss_rpn_loc"].item() == pytest.approx(0, abs=1e-5)


def test_losses_are_divided_by_the_number_of_sampled_anchors():
    """One image has 1 foreground and 7 background anchors; the other has 0 (counted as 1) and 8."""
    rpn = small_rpn(samples=8, positive_fraction=0.25, divide_by_sampled=True)
    found = rpn(features())
    objects = target([torch.cat(found.anchors)[100].tolist()], [0])
    losses = rpn.losses(filled(found, 1), Targets.of([objects, target([], [])]))
    assert losses["loss_rpn_cls"].item() == pytest.approx(16 * math.log(2) / 17)
    assert losses["loss_rpn_loc"].item() == pytest.approx(4 / 17, rel=1e-5)


def test_the_head_equals_its_layers_with_and_without_norm():
    x = features()[0]
    for norm in (False, True):
        rpn = small_rpn(norm=norm, eps=0.1)
        hidden = x
        for block in rpn.convs:
            assert (block.conv.bias is None) == norm
            hidden = slow_block(block, hidden, 0.1)
        assert torch.allclose(rpn.head(x)[0], rpn.objectness(hidden), atol=1e-5)


def test_proposals_shrink_at_most_to_the_limit():
    found = Anchored(*one_level([[0.0, 0, 32, 32]], [1.0]))
    found.deltas[0][..., 2:] = -9.0
    sides = []
    for limit in (-math.inf, -math.log(4)):
        (proposals,) = by_image(small_rpn(min_log_scale=limit).propose(found, SIZES[:1], (4, 10)))
        sides.append((proposals.boxes[0, 2:] - proposals.boxes[0, :2]).tolist())
    assert sides[0] == pytest.approx([32 * math.exp(-9)] * 2, rel=1e-2)
    assert sides[1] == pytest.approx([8, 8])


def test_sampled_anchors_match_their_ground_truth():
    rpn = small_rpn(samples=32)
    anchors = torch.cat(rpn(features()).anchors)
    objects = target([[5, 5, 30, 31], [40, 10, 60, 60]], [0, 1])
    (matched,), sampled = rpn.sample(anchors, Targets.of([objects]))
    positive = sampled.chosen[sampled.foreground]
    negative = sampled.chosen[sampled.filled & ~sampled.foreground]
    iou = pairwise_iou(objects.boxes, anchors)
    assert 1 <= len(positive) <= 16 and len(positive) + len(negative) == 32
    assert (iou.amax(dim=0)[negative] < 0.3).all()
    best = iou == iou.amax(dim=1, keepdim=True)
    assert ((iou.amax(dim=0)[positive] >= 0.7) | best.any(dim=0)[positive]).all()
    assert torch.equal(matched[positive], iou.argmax(dim=0)[positive])


def test_losses_of_perfect_predictions_are_small():
    rpn = small_rpn(samples=32)
    found = rpn(features())
    objects = target([[5, 5, 30, 31]], [0])
    (matched,), _ = rpn.sample(torch.cat(found.anchors), Targets.of([objects]))
    right = torch.where(matched >= 0, 20.0, -20.0)[None]
    right = list(right.split([x.shape[1] for x in found.logits], dim=1))
    perfect = Anchored(right, [x[:1] for x in found.deltas], found.anchors)
    losses = rpn.losses(perfect, Targets.of([objects]))
    assert losses["loss_rpn_cls"].item() < 1e-6
