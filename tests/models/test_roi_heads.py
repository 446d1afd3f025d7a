"""RoI heads: sampling, class columns of the loss, the cascade, and selection of detections."""

import math

import pytest
import torch

from tests.helpers.small import CLASSES, images, small_detector, target
from vitdet.models.assign import IGNORE, match_keeping_best
from vitdet.models.boxes import encode, pairwise_iou
from vitdet.models.roi_heads import CANDIDATES, WEIGHTS, Assigned, detections
from vitdet.models.roi_pool import pool
from vitdet.models.rpn import Proposals
from vitdet.types import Targets

SIZES = torch.tensor([[128, 128], [100, 90]])


@pytest.fixture
def heads():
    return small_detector().roi_heads


def proposals(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 80
    return torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 40], dim=1)


def maps(count):
    return [torch.randn(count, 16, 128 // stride, 128 // stride) for stride in (4, 8, 16, 32)]


def slots(boxes):
    """Return boxes (N, 4) of one image as filled slots (1, N, 4)."""
    return boxes[None], torch.ones(1, len(boxes), dtype=torch.bool)


def test_foreground_comes_first_and_ground_truths_are_candidates(heads):
    objects = target([[10, 10, 50, 60], [70, 70, 90, 120]], [1, 3])
    found = heads.sample(*slots(proposals(100)), Targets.of([objects]))
    (boxes,), (foreground,) = found.boxes, found.matched >= 0
    assert len(boxes) == 24 and found.filled.all()
    assert 2 <= foreground.sum() <= 6 == found.most
    assert (foreground.int().diff() <= 0).all()
    iou = pairwise_iou(objects.boxes, boxes).amax(dim=0)
    assert (iou[foreground] >= 0.5).all() and (iou[~foreground] < 0.5).all()
    alone = heads.sample(*slots(torch.zeros(0, 4)), Targets.of([objects]))
    assert sorted(alone.boxes[0, :, 0].tolist()) == [10, 70]
    assert sorted(alone.matched[0].tolist()) == [0, 1]


def test_empty_slots_of_proposals_and_of_ground_truths_are_not_sampled(heads):
    """One image has two objects, the other has none; their numbers of proposals differ."""
    objects = target([[10, 10, 50, 60], [70, 70, 90, 120]], [1, 3])
    boxes = torch.stack([proposals(6), proposals(6)])
    filled = torch.tensor([[True] * 6, [True, True, False, False, False, False]])
    found = heads.sample(boxes, filled, Targets.of([objects, target([], [])], slots=5))
    assert found.filled.sum(dim=1).tolist() == [8, 2]
    assert (found.matched[1][found.filled[1]] == -1).all()


def test_ground_truths_are_not_candidates_with_keep_best(heads):
    """As a candidate, each ground truth would be its own best box."""
    objects = target([[10, 10, 50, 50], [10, 10, 50, 80]], [1, 3])
    boxes = torch.tensor([[10.0, 10, 50, 52], [10, 10, 50, 58]])  # both boxes fit object 0 best
    # choose candidates in order
    heads.choose = lambda candidates, num: (1 / torch.arange(1.0, 5)).expand(candidates.shape)
    targets = Targets.of([objects])
    assert heads.sample(*slots(boxes), targets).matched.tolist() == [[0, 0, 0, 1]]
    heads.match = match_keeping_best
    assert heads.sample(*slots(boxes), targets).matched.tolist() == [[0, 1, 0, 1]]


def test_stages_shrink_boxes_at_most_to_the_limit(heads):
    box, deltas = torch.tensor([0.0, 0, 64, 64]), torch.tensor([0.0, 0, -50, 0])
    for limit, width in ((-math.inf, 64 * math.exp(-10)), (-math.log(8), 8)):
        heads.min_log_scale = limit
        found = heads.decode(0, box, deltas)
        assert (found[2] - found[0]).item() == pytest.approx(width, rel=1e-2)


def test_the_background_is_the_last_class(heads):
    objects = target([[10, 10, 50, 60], [70, 70, 90, 120]], [1, 3])
    matched = torch.tensor([[1, -1, 0], [-1, -1, IGNORE]])
    assigned = Assigned(torch.stack([proposals(3)] * 2), matched, 3)
    found = heads.labels(assigned, Targets.of([objects, target([], [])]))
    assert found.tolist() == [[3, CLASSES, 1], [CLASSES] * 3]


def test_the_box_loss_uses_the_column_of_the_class(heads):
    objects = target([[10, 10, 50, 60]], [2])
    targets = Targets.of([objects])
    boxes = torch.tensor([[[12.0, 8, 52, 66], [0, 0, 5, 5], [0, 0, 0, 0]]])  # the last box is empty
    assigned = Assigned(boxes, torch.tensor([[0, -1, IGNORE]]), 3)
    wanted = encode(boxes[:, :1], objects.boxes[None], WEIGHTS)
    labels = torch.tensor([[2, CLASSES, CLASSES]])
    deltas = torch.full((1, 3, CLASSES, 4), 100.0)
    deltas[0, 0, 2] = wanted[0, 0] + 1
    loss = heads.box_loss(0, deltas, labels, assigned, targets)
    assert loss.item() == pytest.approx(4 / 2, rel=1e-5)
    agnostic = (wanted[:, :, None] - 0.5).expand(1, 3, 1, 4)
    loss = heads.box_loss(0, agnostic, labels, assigned, targets)
    assert loss.item() == pytest.approx(2 / 2, rel=1e-5)


def select(heads, boxes, scores, candidates=CANDIDATES):
    """Select the detections of one image from boxes (N, K or 1, 4) and scores (N, K)."""
    filled = torch.ones(1, len(boxes), dtype=torch.bool)
    found = heads.select(boxes[None], scores[None], filled, candidates)
    return detections(found, None)[0]


def test_select_applies_threshold_nms_per_class_and_limit(heads):
    base = torch.tensor([[10.0, 10, 50, 50], [11, 10, 51, 50], [60, 60, 90, 90]])
    boxes = base[:, None].expand(3, CLASSES, 4)
    scores = torch.zeros(3, CLASSES)
    scores[:, 0] = torch.tensor([0.6, 0.9, 0.04])  # overlapping boxes, then one below the threshold
    scores[0, 1] = 0.5  # the same box with another class
    scores[2, 3] = 0.7
    found = select(heads, boxes, scores)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert found.labels.tolist() == [0, 3, 1]
    assert found.boxes.tolist() == [base[1].tolist(), base[2].tolist(), base[0].tolist()]
    agnostic = select(heads, base[:, None], scores)
    assert torch.equal(agnostic.boxes, found.boxes) and torch.equal(agnostic.labels, found.labels)
    heads.max_detections = 2
    assert len(select(heads, boxes, scores)) == 2
    assert len(select(heads, boxes, scores * 0)) == 0
    assert len(select(heads, boxes[:0], scores[:0])) == 0


def test_select_drops_boxes_and_scores_that_are_not_finite(heads):
    boxes = torch.tensor([[[10.0, 10, 50, 50]], [[float("nan"), 0, 1, 1]], [[60, 60, 90, 90]]])
    scores = torch.full((3, CLASSES), 0.3)
    scores[2, 1] = float("nan")
    assert select(heads, boxes, scores).boxes[:, 0].unique().tolist() == [10]


def test_select_keeps_boxes_without_area_and_the_order_of_equal_scores(heads):
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [5, 5, 9, 9], [60, 60, 90, 90]])
    scores = torch.zeros(4, CLASSES)
    scores[:, 1] = 0.5
    found = select(heads, boxes[:, None], scores)
    assert torch.equal(found.boxes, boxes)


def test_select_returns_whether_its_candidates_sufficed(heads):
    """With 64 copies of a box and 64 boxes of lower scores, 64 candidates are only copies."""
    boxes = torch.cat([torch.tensor([[10.0, 10, 50, 50]]).repeat(64, 1), proposals(64)])[:, None]
    scores = torch.zeros(1, 128, CLASSES)
    scores[:, :, 0] = torch.linspace(0.9, 0.1, 128)
    filled = torch.ones(1, 128, dtype=torch.bool)
    few, all_of_them = (heads.select(boxes[None], scores, filled, n) for n in (64, 512))
    assert few.filled.sum() == 1 < all_of_them.filled.sum()
    assert not few.exact.any() and all_of_them.exact.all()
    heads.max_detections = 1
    assert heads.select(boxes[None], scores, filled, 64).exact.all()


@torch.no_grad()
def test_detection_retries_with_more_candidates(monkeypatch):
    detector = small_detector().eval()
    pixels = images(2)
    wanted = detector(pixels)
    monkeypatch.setattr("vitdet.models.roi_heads.CANDIDATES", 3)
    for result, other in zip(detector(pixels), wanted, strict=True):
        assert len(result) > 3
        assert torch.equal(result.boxes, other.boxes) and torch.equal(result.scores, other.scores)
        assert torch.equal(result.masks, other.masks)


def test_the_next_stage_trains_on_boxes_clipped_to_the_image():
    heads = small_detector(ious=(0.5, 0.6, 0.7)).roi_heads
    objects = target([[10, 10, 50, 50]], [1])
    inside = [[10.0, 10, 50, 50], [10, 10, 50, 40], [10, 10, 50, 34]]
    refined = torch.tensor([*inside, [-20, -20, -5, -5], [60, 80, 200, 90]])
    filled = torch.tensor([[True] * 5, [False] * 5])
    targets, sizes = Targets.of([objects, target([], [])]), torch.tensor([[128, 128], [9, 9]])
    found = heads.reassign(2, torch.stack([refined] * 2), filled, targets, sizes)
    # the empty box is removed
    assert found.filled.tolist() == [[True, True, True, False, True], [False] * 5]
    boxes = found.boxes[found.filled]
    assert boxes.tolist() == [*inside, [60, 80, 128, 90]]
    # IoUs of 1, 0.75, 0.6 and 0 with a threshold of 0.7
    assert found.matched[found.filled].tolist() == [0, 0, -1, -1]


@torch.no_grad()
def test_each_stage_gets_the_clipped_boxes_of_the_previous_stage(monkeypatch):
    heads = small_detector(ious=(0.5, 0.6, 0.7)).roi_heads
    for stage in heads.stages:
        # every stage at least doubles the boxes
        stage.deltas.bias.copy_(torch.tensor([0.0, 0.0, 10.0, 10.0]))
    seen, run_stage = [], heads.run_stage

    def record(stage, features, boxes, filled):
        seen.append(boxes[filled])
        return run_stage(stage, features, boxes, filled)

    monkeypatch.setattr(heads, "run_stage", record)
    features = maps(2)
    boxes = torch.stack([proposals(6), proposals(6, seed=1)])
    filled = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    heads.find(features, Proposals(boxes, torch.zeros(2, 6), filled), SIZES)
    # no stage removed a box
    assert [len(boxes) for boxes in seen] == [10, 10, 10]
    limits = torch.tensor([[128.0, 128.0]] * 6 + [[90.0, 100.0]] * 4)
    for boxes in seen[1:]:
        assert (boxes >= 0).all() and (boxes[:, 2:] <= limits).all()
        assert (boxes[:, 2:] == limits).any()
    assert not torch.equal(seen[1], seen[2])


def test_cascade_stages_have_growing_weights_and_class_agnostic_boxes():
    heads = small_detector(ious=(0.5, 0.6, 0.7)).roi_heads
    assert heads.weights == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    features = maps(1)
    logits, deltas = heads.run_stage(1, features, *slots(proposals(5)))
    assert logits.shape == (1, 5, CLASSES + 1) and deltas.shape == (1, 5, 1, 4)


def test_cascade_scales_the_gradient_of_the_features_but_not_of_the_head():
    heads = small_detector(ious=(0.5, 0.6, 0.7)).roi_heads
    stage, gradients = heads.stages[0], []
    for scaled in (False, True):
        features = [torch.ones_like(level).requires_grad_() for level in maps(1)]
        stage.zero_grad()
        if scaled:
            logits, _ = heads.run_stage(0, features, *slots(proposals(5)))
        else:
            rois = proposals(5), torch.zeros(5, dtype=torch.int64)
            logits, _ = stage(pool(features, *rois, heads.strides, 7, heads.sampling_ratio))
        logits.square().sum().backward()
        gradients.append((features[0].grad, stage.logits.weight.grad.clone()))
    assert gradients[0][0].abs().sum() > 0
    assert torch.allclose(gradients[0][0] / 3, gradients[1][0], rtol=1e-4, atol=1e-7)
    assert torch.allclose(gradients[0][1], gradients[1][1])


def test_the_mask_loss_limits_the_boxes_per_image(heads, monkeypatch):
    seen = []

    def forward(pooled, labels):
        seen.append(labels)
        return torch.zeros(len(labels), 28, 28)

    monkeypatch.setattr(heads.mask, "forward", forward)
    features = maps(2)
    objects = target([[10, 10, 50, 50], [60, 60, 80, 90]], [1, 2])
    matched = torch.tensor([[0] * 12 + [-1] * 8, [1, -1, -1] + [IGNORE] * 17])
    assigned = Assigned(torch.stack([proposals(20)] * 2), matched, 12)
    heads.mask_loss(features, assigned, Targets.of([objects, objects]))
    assert seen[0].tolist() == [1] * 8 + [2]
