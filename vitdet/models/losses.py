"""The loss functions, in at least float32: sums over a selection divided by a count, so an empty selection gives 0.

Letters: R boxes or RoIs, K classes (label K is the background), F classes that the federated loss looks at.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.models.layers import at_least_float32


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean softmax cross-entropy of logits (R, K + 1) and labels (R,) in 0..K."""
    return F.cross_entropy(at_least_float32(logits), labels, reduction="sum") / max(len(labels), 1)


def federated_classes(labels: Tensor, weights: Tensor, num: int, draw: bool = True) -> Tensor:
    """The classes (F,) that a batch is judged on: those present (background K among them) and, up to `num` in all,
    others drawn by weight (K,) without replacement. Zhou et al. (2103.07461).

    draw=False takes the heaviest instead: for comparisons with another implementation, whose draws would be others.
    """
    present = labels.unique()
    odds = torch.cat([weights.float(), weights.new_zeros(1)])
    odds[present] = 0
    missing = min(num - len(present), int((odds > 0).sum()))
    if missing <= 0:
        return present
    if draw:
        return torch.cat([present, torch.multinomial(odds, missing)])
    return torch.cat([present, odds.sort(descending=True, stable=True).indices[:missing]])


def federated_classification(logits: Tensor, labels: Tensor, classes: Tensor) -> Tensor:
    """Sigmoid cross-entropy of logits (R, K + 1) over the chosen classes (F,), summed, divided by R."""
    num_classes = logits.shape[1] - 1
    logits = at_least_float32(logits[:, :num_classes])
    truth = F.one_hot(labels, num_classes + 1)[:, :num_classes].to(logits.dtype)
    chosen = logits.new_zeros(num_classes + 1).index_fill(0, classes, 1.0)[:num_classes]
    loss = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return (loss * chosen).sum() / max(len(labels), 1)


def objectness(logits: Tensor, truth: Tensor, count: int) -> Tensor:
    """Binary cross-entropy of logits (R,) and truth (R,) bool, summed, divided by `count`."""
    logits = at_least_float32(logits)
    return (
        F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="sum") / count
    )


def box_l1(deltas: Tensor, targets: Tensor, count: int) -> Tensor:
    """Absolute differences of deltas (R, 4), summed, divided by `count`."""
    return (at_least_float32(deltas) - targets).abs().sum() / max(count, 1)


def mask_bce(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean binary cross-entropy over logits (R, s, s) and targets (R, s, s)."""
    logits = at_least_float32(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="sum")
    return loss / max(targets.numel(), 1)


class SoftmaxClassification(nn.Module):
    """Exactly one class per box, or the background: COCO."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy of logits (R, K + 1) and labels (R,)."""
        return classification(logits, labels)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(R, K + 1) -> (R, K): the background column is left out."""
        return logits.float().softmax(dim=1)[:, :-1]


class FederatedClassification(nn.Module):
    """Independent binary classifiers, with a loss over a sample of the classes: LVIS.

    `class_weights` (K,) are the odds of drawing each class, image_count ** 0.5 in the published models; `draw` as in
    `federated_classes`.
    """

    class_weights: Tensor

    def __init__(self, *, class_weights: Tensor, num: int, draw: bool = True) -> None:
        super().__init__()
        self.num_classes, self.num, self.draw = len(class_weights), num, draw
        self.register_buffer("class_weights", class_weights)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Sigmoid cross-entropy over the classes of this call; logits (R, K + 1), labels (R,)."""
        classes = federated_classes(labels, self.class_weights, self.num, self.draw)
        return federated_classification(logits, labels, classes)

    def probabilities(self, logits: Tensor) -> Tensor:
        """(R, K + 1) -> (R, K)."""
        return logits.float().sigmoid()[:, :-1]
