"""RoI heads: who is sampled, which column learns, the cascade, and the choice of detections."""

import math

import pytest
import torch

from tests.small import CLASSES, small_detector, target
from vitdet.models.assign import match_keeping_best
from vitdet.models.boxes import encode, pairwise_iou
from vitdet.models.roi_heads import WEIGHTS, Assigned
from vitdet.models.roi_pool import pool

SIZES = torch.tensor([[128, 128], [100, 90]])


@pytest.fixture
def heads():
    return small_detector().roi_heads


def proposals(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(count, 2, generator=generator) * 80
    return torch.cat([corner, corner + 8 + torch.rand(count, 2, generator=generator) * 40], dim=1)


def test_foreground_comes_first_and_ground_truths_are_candidates(heads):
    one = target([[10, 10, 50, 60], [70, 70, 90, 120]], [1, 3])
    found = heads.sample(proposals(100), one)
    foreground = found.matched >= 0
    assert len(found.boxes) == 24
    assert 2 <= foreground.sum() <= 6
    assert (foreground.int().diff() <= 0).all()
    iou = pairwise_iou(one.boxes, found.boxes).amax(dim=0)
    assert (iou[foreground] >= 0.5).all() and (iou[~foreground] < 0.5).all()
    alone = heads.sample(torch.zeros(0, 4), one)
    assert sorted(alone.boxes[:, 0].tolist()) == [10, 70] and sorted(alone.matched.tolist()) == [
        0,
        1,
    ]


def test_ground_truths_are_apart_when_their_best_boxes_are_kept(heads):
    """The best proposal of each learns from it; were the ground truths among the boxes, each would be its own best."""
    one = target([[10, 10, 50, 50], [10, 10, 50, 80]], [1, 3])
    boxes = torch.tensor([[10.0, 10, 50, 52], [10, 10, 50, 58]])  # both closer to the first
    heads.choose = lambda candidates, num: candidates
    assert heads.sample(boxes, one).matched.tolist() == [0, 0, 0, 1]
    heads.match = match_keeping_best
    assert heads.sample(boxes, one).matched.tolist() == [0, 1, 0, 1]


def test_a_stage_shrinks_no_further_than_said(heads):
    box, deltas = torch.tensor([[0.0, 0, 64, 64]]), torch.tensor([[[0.0, 0, -50, 0]]])
    for limit, width in ((-math.inf, 64 * math.exp(-10)), (-math.log(8), 8)):
        heads.min_log_scale = limit
        found = heads.decode(0, box, deltas)[0, 0]
        assert (found[2] - found[0]).item() == pytest.approx(width, rel=1e-2)


def test_labels_name_the_background_last(heads):
    one = target([[10, 10, 50, 60], [70, 70, 90, 120]], [1, 3])
    assigned = Assigned(proposals(3), torch.tensor([1, -1, 0]))
    assert heads.labels(assigned, one).tolist() == [3, CLASSES, 1]
    assert (
        heads.labels(Assigned(proposals(2), torch.tensor([-1, -1])), target([], [])).tolist()
        == [CLASSES] * 2
    )


def test_box_loss_looks_at_the_column_of_the_class(heads):
    one = target([[10, 10, 50, 60]], [2])
    assigned = [Assigned(torch.tensor([[12.0, 8, 52, 66], [0, 0, 5, 5]]), torch.tensor([0, -1]))]
    wanted = encode(assigned[0].boxes[:1], one.boxes, WEIGHTS)
    labels = torch.tensor([2, CLASSES])
    deltas = torch.full((2, CLASSES, 4), 100.0)
    deltas[0, 2] = wanted[0] + 1
    assert heads.box_loss(0, deltas, labels, assigned, [one]).item() == pytest.approx(
        4 / 2, rel=1e-5
    )
    agnostic = (wanted[:, None] - 0.5).expand(2, 1, 4)
    assert heads.box_loss(0, agnostic, labels, assigned, [one]).item() == pytest.approx(
        2 / 2, rel=1e-5
    )


def test_select_thresholds_suppresses_within_classes_and_counts(heads):
    base = torch.tensor([[10.0, 10, 50, 50], [11, 10, 51, 50], [60, 60, 90, 90]])
    boxes = base[:, None].expand(3, CLASSES, 4)
    scores = torch.zeros(3, CLASSES)
    scores[:, 0] = torch.tensor([0.6, 0.9, 0.04])  # neighbours; below the threshold
    scores[0, 1] = 0.5  # the same place, another class
    scores[2, 3] = 0.7
    found = heads.select(boxes, scores)
    assert found.scores.tolist() == pytest.approx([0.9, 0.7, 0.5])
    assert found.labels.tolist() == [0, 3, 1]
    assert found.boxes.tolist() == [base[1].tolist(), base[2].tolist(), base[0].tolist()]
    agnostic = heads.select(base[:, None], scores)
    assert torch.equal(agnostic.boxes, found.boxes) and torch.equal(agnostic.labels, found.labels)
    heads.max_detections = 2
    assert len(heads.select(boxes, scores)) == 2
    assert len(heads.select(boxes, scores * 0)) == 0
    assert len(heads.select(boxes[:0], scores[:0])) == 0


def test_select_leaves_out_what_is_no_number(heads):
    boxes = torch.tensor([[[10.0, 10, 50, 50]], [[float("nan"), 0, 1, 1]], [[60, 60, 90, 90]]])
    scores = torch.full((3, CLASSES), 0.3)
    scores[2, 1] = float("nan")
    assert heads.select(boxes, scores).boxes[:, 0].unique().tolist() == [10]


def test_next_stage_learns_from_boxes_cut_to_the_picture():
    heads = small_detector(ious=(0.5, 0.6, 0.7)).roi_heads
    one = target([[10, 10, 50, 50]], [1])
    refined = torch.tensor(
        [
            [10.0, 10, 50, 50],
            [10, 10, 50, 40],
            [10, 10, 50, 34],
            [-20, -20, -5, -5],
            [60, 80, 200, 90],
        ]
    )
    (found, _) = heads.reassign(
        2, [refined, refined[:0]], [one, target([], [])], torch.tensor([[128, 128], [9, 9]])
    )
    # the empty one is gone
    assert found.boxes.tolist() == [*refined[:3].tolist(), [60, 80, 128, 90]]
    assert found.matched.tolist() == [0, 0, -1, -1]  # IoU 1, 0.75, 0.6, 0 against 0.7


@torch.no_grad()
def test_every_stage_of_detection_takes_the_boxes_of_the_one_before_cut_to_the_picture(monkeypatch):
    heads = small_detector(ious=(0.5, 0.6, 0.7)).roi_heads
    for stage in heads.stages:
        # every stage doubles boxes, or more
        stage.deltas.bias.copy_(torch.tensor([0.0, 0.0, 10.0, 10.0]))
    seen, run_stage = [], heads.run_stage

    def record(stage, features, boxes):
        seen.append(torch.cat(list(boxes)))
        return run_stage(stage, features, boxes)

    monkeypatch.setattr(heads, "run_stage", record)
    features = [torch.randn(2, 16, 128 // s, 128 // s) for s in (4, 8, 16, 32)]
    found = heads.detect(features, [proposals(6), proposals(4, seed=1)], SIZES)
    # none dropped on the way
    assert len(found) == 2 and [len(boxes) for boxes in seen] == [10, 10, 10]
    limits = torch.tensor([[128.0, 128.0]] * 6 + [[90.0, 100.0]] * 4)
    for boxes in seen[1:]:
        assert (boxes >= 0).all() and (boxes[:, 2:] <= limits).all()
        assert (boxes[:, 2:] == limits).any()
    assert not torch.equal(seen[1], seen[2])


def test_stages_have_growing_weights_and_one_box_for_all_classes():
    heads = small_detector(ious=(0.5, 0.6, 0.7)).roi_heads
    assert heads.weights == [(10, 10, 5, 5), (20, 20, 10, 10), (30, 30, 15, 15)]
    features = [torch.randn(1, 16, 128 // s, 128 // s) for s in (4, 8, 16, 32)]
    logits, deltas = heads.run_stage(1, features, [proposals(5)])
    assert logits.shape == (5, CLASSES + 1) and deltas.shape == (5, 1, 4)


def test_cascade_scales_the_gradient_of_the_features_and_not_of_the_head():
    heads = small_detector(ious=(0.5, 0.6, 0.7)).roi_heads
    stage, gradients = heads.stages[0], []
    for scaled in (False, True):
        features = [
            torch.ones(1, 16, 128 // s, 128 // s, requires_grad=True) for s in (4, 8, 16, 32)
        ]
        stage.zero_grad()
        if scaled:
            logits, _ = heads.run_stage(0, features, [proposals(5)])
        else:
            logits, _ = stage(
                pool(features, [proposals(5)], heads.strides, 7, heads.sampling_ratio)
            )
        logits.square().sum().backward()
        gradients.append((features[0].grad, stage.logits.weight.grad.clone()))
    assert gradients[0][0].abs().sum() > 0
    assert torch.allclose(gradients[0][0] / 3, gradients[1][0], rtol=1e-4, atol=1e-7)
    assert torch.allclose(gradients[0][1], gradients[1][1])


def test_mask_loss_takes_at_most_its_share_of_an_image(heads, monkeypatch):
    seen = []

    def forward(pooled, labels):
        seen.append(labels)
        return torch.zeros(len(labels), 28, 28)

    monkeypatch.setattr(heads.mask, "forward", forward)
    features = [torch.randn(2, 16, 128 // s, 128 // s) for s in (4, 8, 16, 32)]
    one = target([[10, 10, 50, 50], [60, 60, 80, 90]], [1, 2])
    matched = torch.tensor([0] * 12 + [-1] * 8), torch.tensor([1, -1, -1])
    assigned = [Assigned(proposals(len(m)), m) for m in matched]
    heads.mask_loss(features, assigned, [one, one])
    assert seen[0].tolist() == [1] * 8 + [2]
