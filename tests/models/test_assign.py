"""Matching against a loop over boxes, and the limits of sampling."""

from functools import partial

import pytest
import torch

from vitdet.models.assign import (
    BACKGROUND,
    IGNORE,
    choose_randomly,
    match,
    match_keeping_best,
    match_keeping_own,
    sample,
)
from vitdet.models.boxes import pairwise_iou


def slow_match(iou, low, high, keep_best=False):
    truths, boxes = iou.shape
    matched = []
    for n in range(boxes):
        column = [iou[g, n].item() for g in range(truths)]
        best = max(column, default=0.0)
        index = column.index(best) if column else None
        is_best = any(iou[g, n] == iou[g].max() and iou[g, n] > 0 for g in range(truths))
        if index is not None and (best >= high or (keep_best and is_best)):
            matched.append(index)
        else:
            matched.append(BACKGROUND if best < low else IGNORE)
    return matched


def slow_match_keeping_best(iou, low, high):
    """Match like mmdet: each ground truth in turn gets its best boxes, if they reach `low`."""
    matched = slow_match(iou, low, high)
    for g, row in enumerate(iou.tolist()):
        if max(row) >= low:
            for n, value in enumerate(row):
                if value == max(row):
                    matched[n] = g
    return matched


@pytest.mark.parametrize(
    "ours, slow",
    [
        (match, slow_match),
        (match_keeping_own, partial(slow_match, keep_best=True)),
        (match_keeping_best, slow_match_keeping_best),
    ],
)
@pytest.mark.parametrize("truths", [0, 1, 5, 30])
@pytest.mark.parametrize(("low", "high"), [(0.3, 0.7), (0.5, 0.5)])
def test_matching_equals_a_loop_over_boxes(ours, slow, truths, low, high):
    # float32 values, like the IoUs
    low, high = torch.tensor([low, high]).tolist()
    generator = torch.Generator().manual_seed(truths)
    for _ in range(10):
        # integer coordinates: many ties
        boxes = torch.randint(0, 20, (truths + 40, 4), generator=generator).float()
        boxes[:, 2:] += boxes[:, :2] + 1
        iou = pairwise_iou(boxes[:truths], boxes[truths:])
        expected = slow(iou, low, high)
        for rows in (1, 4, 30):
            assert ours(iou.split(rows), low, high).tolist() == expected


def test_an_iou_equal_to_a_threshold_reaches_it():
    iou = torch.tensor([[0.29, 0.3, 0.69, 0.7, 1.0]])
    assert match([iou], 0.3, 0.7).tolist() == [BACKGROUND, IGNORE, IGNORE, 0, 0]


def test_the_best_box_of_two_ground_truths_is_assigned_to_the_closer_one():
    iou = torch.tensor([[0.2, 0.0], [0.25, 0.1]])  # box 0 is the best box of both objects
    assert match_keeping_own([iou], 0.3, 0.7).tolist() == [1, BACKGROUND]
    # both IoUs are below the low threshold
    assert match_keeping_best([iou], 0.3, 0.7).tolist() == [BACKGROUND, BACKGROUND]


def test_the_best_box_of_a_ground_truth_is_assigned_to_it():
    iou = torch.tensor(
        [[0.9, 0.9, 0.0, 0.3], [0.0, 0.6, 0.0, 0.3], [0.0, 0.0, 0.2, 0.0], [0.3, 0.3, 0.0, 0.3]]
    )
    # the three equally good boxes of the last ground truth are all assigned to it
    assert match_keeping_best([iou], 0.3, 0.7).tolist() == [3, 3, BACKGROUND, 3]
    assert match_keeping_best([iou[:3]], 0.3, 0.7).tolist() == [0, 1, BACKGROUND, IGNORE]
    assert match_keeping_own([iou[:3]], 0.3, 0.7).tolist() == [0, 0, 2, IGNORE]


@pytest.mark.parametrize("matching", [match_keeping_own, match_keeping_best])
def test_a_ground_truth_without_overlap_makes_no_box_foreground(matching):
    assert matching([torch.zeros(1, 4)], 0.3, 0.7).tolist() == [BACKGROUND] * 4
    assert matching([torch.zeros(1, 4)], 0.0, 0.7).tolist() == [IGNORE] * 4
    assert matching([torch.zeros(3, 0)], 0.3, 0.7).tolist() == []


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [(50, 100, (8, 24)), (3, 100, (3, 29)), (50, 5, (8, 5)), (0, 100, (0, 32)), (0, 0, (0, 0))],
)
def test_a_sample_has_limited_foreground_and_background_fills_it(positives, negatives, expected):
    matched = torch.tensor([0] * positives + [BACKGROUND] * negatives + [IGNORE] * 7)
    matched = matched[torch.randperm(len(matched), generator=torch.Generator().manual_seed(0))]
    # in a batch with a background-only image, each image has its own counts
    both = torch.stack([matched, torch.full_like(matched, BACKGROUND)])
    found = sample(both, 32, 0.25, choose_randomly)
    assert found.most == min(8, len(matched)) and found.chosen.shape[1] == min(32, len(matched))
    assert (found.foreground.int().diff(dim=1) <= 0).all()
    assert (found.filled.int().diff(dim=1) <= 0).all()
    positive = found.chosen[0][found.foreground[0]]
    negative = found.chosen[0][found.filled[0] & ~found.foreground[0]]
    assert (len(positive), len(negative)) == expected
    assert (matched[positive] == 0).all() and (matched[negative] == BACKGROUND).all()
    chosen = torch.cat([positive, negative])
    assert len(chosen.unique()) == len(chosen)
    assert found.filled[1].sum() == found.chosen.shape[1] and not found.foreground[1].any()


def test_random_sampling_is_uniform_and_seeded():
    matched = torch.full((1, 30), IGNORE)
    matched[:, ::3] = 0

    def draw():
        return sample(matched, 5, 1.0, choose_randomly).chosen[0]

    torch.manual_seed(0)
    drawn = torch.stack([draw() for _ in range(400)])
    counts = drawn.flatten().bincount(minlength=30)
    assert counts[::3].min() > 140 and counts[::3].max() < 260
    assert counts.sum() == counts[::3].sum() == 2000
    torch.manual_seed(0)
    assert torch.equal(draw(), drawn[0])


def test_a_foreground_share_of_zero_samples_no_foreground():
    matched = torch.tensor([[0, BACKGROUND, 0, BACKGROUND]])
    found = sample(matched, 3, 0.0, choose_randomly)
    assert found.filled.tolist() == [[True, True, False]] and not found.foreground.any()
    assert sorted(found.chosen[0, :2].tolist()) == [1, 3]
