"""Loss functions: literal values, empty selections, and the federated choice of classes."""

import math

import pytest
import torch

from vitdet.models import losses
from vitdet.models.losses import FederatedClassification, SoftmaxClassification, federated_classes


def test_losses_equal_literal_values():
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    found = losses.classification(logits, torch.tensor([0, 1]))
    assert found.item() == pytest.approx((math.log(4) + math.log(2)) / 2)
    found = losses.objectness(torch.tensor([0.0, 2.0]), torch.tensor([True, False]), 4)
    assert found.item() == pytest.approx((math.log(2) + math.log(1 + math.exp(2))) / 4)
    found = losses.box_l1(torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[0.0, 2, 5, 4.5]]), 7)
    assert found.item() == 0.5
    found = losses.mask_bce(torch.zeros(1, 2, 2), torch.ones(1, 2, 2, dtype=torch.bool))
    assert found.item() == pytest.approx(math.log(2))


def test_empty_selections_have_zero_loss_and_a_gradient():
    nothing = torch.zeros(0, 4, requires_grad=True)
    found = [
        losses.classification(nothing, torch.zeros(0, dtype=torch.long)),
        losses.federated_classification(nothing, torch.zeros(0, dtype=torch.long), mask(4, 3)),
        losses.objectness(nothing[:, 0], torch.zeros(0, dtype=torch.bool), 8),
        losses.box_l1(nothing, torch.zeros(0, 4), 0),
        losses.mask_bce(nothing.view(0, 2, 2), torch.zeros(0, 2, 2, dtype=torch.bool)),
    ]
    assert [loss.item() for loss in found] == [0.0] * 5
    sum(found).backward()
    assert nothing.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_precision_of_losses_is_float32_or_better(dtype):
    logits, labels = torch.zeros(2, 3, dtype=dtype), torch.tensor([0, 2])
    wanted = torch.float32 if dtype == torch.bfloat16 else torch.float64
    found = [
        losses.classification(logits, labels),
        losses.federated_classification(logits, labels, mask(3, 0, 2)),
        losses.objectness(logits[:, 0], labels > 0, 1),
        losses.box_l1(logits, torch.zeros(2, 3), 1),
        losses.mask_bce(logits, labels[:, None].expand(2, 3) > 0),
    ]
    assert [loss.dtype for loss in found] == [wanted] * 5


def mask(num, *classes):
    return torch.zeros(num, dtype=torch.bool).index_fill(0, torch.tensor(classes), True)


def test_the_federated_loss_uses_only_the_chosen_classes():
    # the last class is background
    logits = torch.tensor([[1.0, -2.0, 3.0, 9.0], [0.5, 0.0, -1.0, 9.0]], requires_grad=True)
    labels = torch.tensor([0, 3])
    found = losses.federated_classification(logits, labels, mask(4, 0, 2, 3))
    wanted = [math.log(1 + math.exp(x)) for x in (-1.0, 3.0, 0.5, -1.0)]
    assert found.item() == pytest.approx(sum(wanted) / 2)
    found.backward()
    assert (logits.grad[:, [1, 3]] == 0).all() and (logits.grad[:, [0, 2]] != 0).all()


def test_federated_classes_are_the_present_and_the_drawn_classes():
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 0.0, 4.0, 1.0, 1.0, 1.0])
    labels = torch.tensor([6, 2, 2, 6])
    for _ in range(20):
        found = federated_classes(labels, weights, 4)
        assert found[2] and found[6]
        assert found.sum() == 4 and not found[1]  # class 1 has zero weight
    assert torch.equal(federated_classes(labels, weights, 4, draw=False), mask(7, 2, 6, 0, 3))
    assert torch.equal(federated_classes(labels, weights, 2), mask(7, 2, 6))
    # more classes present than requested
    assert federated_classes(torch.arange(7), weights, 3).all()


def test_federated_classes_are_drawn_by_weight():
    torch.manual_seed(0)
    weights = torch.tensor([1.0, 3.0, 0.0])
    drawn = [federated_classes(torch.tensor([3]), weights, 2)[1].item() for _ in range(600)]
    assert 390 < drawn.count(True) < 510


def test_federated_classes_are_drawn_without_replacement():
    found = federated_classes(torch.tensor([3]), torch.tensor([1.0, 0.0, 0.0]), 4)
    assert torch.equal(found, mask(4, 0, 3))
    weights = torch.tensor([1.0, 1.0, 0.0])
    for draw in (True, False):
        found = federated_classes(torch.tensor([0, 3]), weights, 4, draw)
        assert torch.equal(found, mask(4, 0, 1, 3))


def test_empty_slots_do_not_count():
    """An empty slot changes no loss of the two filled slots, and has a gradient of 0."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 5, generator=generator, requires_grad=True)
    labels, counts = torch.tensor([4, 1, 2]), torch.tensor([True, True, False])
    weights = torch.ones(4)
    classes = federated_classes(labels, weights, 2, draw=False, counts=counts)
    assert torch.equal(classes, federated_classes(labels[:2], weights, 2, draw=False))
    cells, truth = logits[:, :4].view(3, 2, 2), torch.ones(3, 2, 2, dtype=torch.bool)
    cases = [
        (losses.classification, (logits, labels), ()),
        (losses.federated_classification, (logits, labels), (classes,)),
        (losses.objectness, (logits[:, 0], counts), (3,)),
        (losses.box_l1, (logits[:, :4], torch.zeros(3, 4)), (3,)),
        (losses.mask_bce, (cells, truth), ()),
    ]
    ours = [loss(*rows, *rest, counts=counts) for loss, rows, rest in cases]
    wanted = [loss(*(row[:2] for row in rows), *rest).item() for loss, rows, rest in cases]
    assert [loss.item() for loss in ours] == pytest.approx(wanted, rel=1e-6)
    sum(ours).backward()
    assert (logits.grad[2] == 0).all() and (logits.grad[:2] != 0).any()
    nothing = torch.zeros(3, dtype=torch.bool)
    assert losses.classification(logits, labels, nothing).item() == 0
    assert losses.mask_bce(cells, truth, nothing).item() == 0


def test_probabilities_exclude_the_background():
    logits = torch.tensor([[0.0, 0.0, math.log(2.0)]])
    softmax = SoftmaxClassification(num_classes=2)
    federated = FederatedClassification(class_weights=torch.ones(2), num=2)
    assert softmax.probabilities(logits)[0].tolist() == pytest.approx([0.25, 0.25])
    assert federated.probabilities(logits)[0].tolist() == pytest.approx([0.5, 0.5])
