"""Exact NMS of many groups: Triton kernels and plain path against a loop over boxes."""

import math

import pytest
import torch

from tests.helpers.triton_device import DEVICE, REGISTRATION, needs_gpu, needs_triton, no_waits
from vitdet.kernels.nms import nms, reference, suppress, suppress_by_label


def slow_nms(boxes, labels, iou):
    """Return which boxes NMS keeps, by a loop over boxes."""
    keep = torch.zeros(boxes.shape[:2], dtype=torch.bool)
    for group, rows in enumerate(boxes):
        kept = []
        for j, box in enumerate(rows):
            if not (box[2] > box[0] and box[3] > box[1]):
                continue
            for i in kept:
                same = labels is None or labels[group, i] == labels[group, j]
                if same and iou_of(rows[i], box) > iou:
                    break
            else:
                kept.append(j)
        keep[group, kept] = True
    return keep


def iou_of(a, b):
    width = (min(a[2], b[2]) - max(a[0], b[0])).clamp(min=0)
    height = (min(a[3], b[3]) - max(a[1], b[1])).clamp(min=0)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - width * height
    return (width * height / union).item()


def centered(center, size):
    return torch.cat([center - size / 2, center + size / 2], dim=-1)


def scene(kind, groups, count):
    draw = torch.Generator().manual_seed(count)

    def uniform(*size):
        return torch.rand(*size, generator=draw)

    def normal(*size):
        return torch.randn(*size, generator=draw)

    shape = (groups, count, 2)
    if kind == "random":
        return centered(uniform(*shape) * 400, uniform(*shape) * 200)
    if kind == "clustered":
        centers = uniform(groups, 5, 2) * 900
        chosen = centers[:, torch.randint(0, 5, (count,), generator=draw)]
        return centered(chosen + normal(*shape) * 8, 80 + normal(*shape) * 8)
    if kind == "tied":  # few distinct boxes, whose IoUs are equal, simple fractions
        corner = torch.randint(0, 4, shape, generator=draw) * 10.0
        return torch.cat([corner, corner + torch.randint(1, 6, shape, generator=draw) * 10.0], 2)
    # a chain: each box suppresses only its neighbors
    steps = torch.arange(count)[None, :, None] * torch.tensor([3.0, 0.0])
    return centered(steps.expand(shape), torch.full(shape, 20.0))


KINDS = ("random", "clustered", "tied", "chain")


@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_path_keeps_the_same_boxes_as_a_loop(kind):
    boxes = scene(kind, 2, 40)
    boxes[:, ::7, 2] = boxes[:, ::7, 0]
    labels = torch.arange(80).view(2, 40) % 3
    for iou in (0.5, 0.6):
        for some in (None, labels):
            assert torch.equal(nms(boxes, some, iou, 40), slow_nms(boxes, some, iou))


def test_labels_far_from_zero_do_not_round_boxes():
    boxes = torch.tensor([[[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 10.0, 5.001]]])
    labels = torch.full((1, 2), 10**9)
    assert nms(boxes, labels, 0.5, 2).tolist() == [[True, False]]
    assert nms(boxes, labels + torch.tensor([0, 1]), 0.5, 2).all()


def test_the_plain_path_accepts_float64_and_empty_inputs():
    assert nms(scene("chain", 1, 5).double(), None, 0.5, 5).tolist() == [
        [True, False, False, True, False]
    ]
    assert nms(torch.zeros(2, 0, 4), None, 0.5, 5).shape == (2, 0)
    assert nms(torch.zeros(0, 3, 4), torch.zeros(0, 3, dtype=torch.long), 0.5, 5).shape == (0, 3)


@needs_triton
@pytest.mark.parametrize(
    ("count", "iou"), [(1, 0.5), (64, 0.7), pytest.param(75, 0.6, marks=pytest.mark.slow)]
)
def test_kernels_keep_the_same_boxes_as_the_plain_path(count, iou):
    boxes = torch.cat([scene(kind, 1, count) for kind in KINDS])
    boxes[:, 3::7, 2] = boxes[:, 3::7, 0]
    boxes[:, 5::11, 1] = math.nan
    labels = torch.arange(4 * count).view(4, count) % 3
    for some in (None, labels):
        on = None if some is None else some.to(DEVICE)
        found = suppress(boxes.to(DEVICE), on, iou, count).cpu()
        assert torch.equal(found, reference(boxes, some, iou))


@needs_triton
@pytest.mark.parametrize("limit", [0, 1, 70])
def test_kernels_mark_at_least_the_first_boxes(limit):
    boxes = scene("random", 1, 150)
    found, wanted = suppress(boxes.to(DEVICE), None, 0.7, limit).cpu(), reference(boxes, None, 0.7)
    marked = found[0].nonzero().flatten()
    assert limit <= len(marked) < limit + 64  # the kernel stops after this block
    assert torch.equal(marked, wanted[0].nonzero().flatten()[: len(marked)])


@needs_triton
def test_kernels_accept_views_and_empty_inputs():
    boxes = scene("random", 2, 20).to(DEVICE)
    found = suppress(boxes.transpose(0, 1).contiguous().transpose(0, 1)[1:], None, 0.5, 20)
    assert torch.equal(found, suppress(boxes, None, 0.5, 20)[1:])
    assert suppress(boxes[:0], None, 0.5, 1).shape == (0, 20)
    assert suppress(boxes[:, :0], None, 0.5, 1).shape == (2, 0)


@needs_triton
def test_many_groups_are_processed_in_parts(monkeypatch):
    monkeypatch.setattr("vitdet.kernels.nms_kernels.MEMORY", 2**10)
    boxes = scene("tied", 5, 20)
    labels = torch.arange(100).view(5, 20) % 2
    found = suppress(boxes.to(DEVICE), labels.to(DEVICE), 0.5, 20).cpu()
    assert torch.equal(found, reference(boxes, labels, 0.5))


@needs_triton
def test_processing_labels_one_by_one_keeps_the_same_boxes():
    boxes = torch.cat([scene(kind, 1, 75) for kind in KINDS])
    boxes[:, 3::7, 2] = boxes[:, 3::7, 0]
    labels = torch.arange(4 * 75).view(4, 75) ** 2 % 11  # different numbers of boxes per label
    found = suppress_by_label(boxes.to(DEVICE), labels.to(DEVICE), 0.5, 75).cpu()
    assert torch.equal(found, reference(boxes, labels, 0.5))


def test_the_memory_of_the_comparisons_is_bounded(monkeypatch):
    """In an LVIS detector, all proposals may have scores above 0 for all 1,203 classes."""
    sizes = []

    def compare(boxes, labels, iou, limit):
        sizes.append(boxes.shape[1])
        return reference(boxes, labels, iou)

    monkeypatch.setattr("vitdet.kernels.nms.enabled", lambda _: True)
    monkeypatch.setattr("vitdet.kernels.nms.suppress", compare)
    for count, together in ((120, 120), (121, 13)):
        monkeypatch.setattr("vitdet.kernels.nms.TOGETHER", 120)
        boxes, labels = scene("random", 2, count), torch.arange(2 * count).view(2, count) % 10
        assert torch.equal(nms(boxes, labels, 0.5, count), reference(boxes, labels, 0.5))
        assert max(sizes) == together, sizes
        sizes.clear()


@needs_triton
def test_the_operator_passes_opcheck():
    boxes = scene("random", 1, 20).to(DEVICE)
    for labels in (None, torch.zeros(1, 20, dtype=torch.long, device=DEVICE)):
        torch.library.opcheck(suppress, (boxes, labels, 0.5, 10), test_utils=REGISTRATION)


@needs_triton
def test_a_threshold_is_rounded_down():
    from vitdet.kernels.nms_kernels import below

    assert below(0.5) == 0.5
    for number in (0.6, 0.7, 1 / 3):
        single = torch.tensor(below(number), dtype=torch.float32)
        assert single.item() <= number < single.nextafter(torch.tensor(math.inf)).item()


@needs_gpu
@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_results_at_full_size_equal_torchvision(kind):
    boxes = scene(kind, 20, 2000)
    found = nms(boxes.cuda(), None, 0.7, 2000).cpu()
    assert torch.equal(found, reference(boxes, None, 0.7))
    labels = torch.arange(8 * 2000).view(8, 2000) % 80
    found = nms(boxes[:8].cuda(), labels.cuda(), 0.5, 2000).cpu()
    assert torch.equal(found, reference(boxes[:8], labels, 0.5))


@needs_gpu
@pytest.mark.cuda
def test_no_operation_synchronizes_with_the_gpu():
    boxes = scene("random", 40, 2000).cuda()
    labels = torch.arange(80_000, device="cuda").view(40, 2000) % 80
    nms(boxes, labels, 0.7, 1000)  # compiles the kernel
    with no_waits():
        nms(boxes, labels, 0.7, 1000)
        nms(boxes, None, 0.7, 1000)
