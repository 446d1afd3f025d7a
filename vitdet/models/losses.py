"""Loss functions, computed in at least float32 and divided by a number of boxes.

Notation: R boxes or RoIs, K classes (label K is the background). `counts` (R,) bool selects the
rows that contribute to a loss, e.g. the filled slots; default: all.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet.models.layers import at_least_float32


def classification(logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return the mean softmax cross-entropy of logits (R, K + 1) and labels (R,) in 0..K."""
    loss = F.cross_entropy(at_least_float32(logits), labels, reduction="none")
    return _sum(loss, counts) / _number(labels, counts)


def federated_classes(
    labels: Tensor, weights: Tensor, num: int, draw: bool = True, counts: Tensor | None = None
) -> Tensor:
    """Return which classes (K + 1,) a batch's loss includes, as in Zhou et al. (arXiv:2103.07461).

    These are all classes in `labels`, where K is the background, and classes that are sampled by
    `weights` (K,) without replacement, up to `num` classes in total. With draw=False, the classes
    with the largest weights replace the sample, for comparisons with other implementations.
    """
    here = torch.ones_like(labels, dtype=torch.bool) if counts is None else counts
    odds = F.pad(weights.float(), (0, 1))
    present = torch.zeros_like(odds).index_add(0, labels, here.to(odds.dtype)) > 0
    odds = torch.where(present, 0.0, odds)
    # the largest quotients are a sample without replacement, as in torch.multinomial
    keys = odds / torch.empty_like(odds).exponential_() if draw else odds
    rank = keys.argsort(descending=True, stable=True).argsort()
    return present | ((rank < num - present.sum()) & (odds > 0))


def federated_classification(
    logits: Tensor, labels: Tensor, classes: Tensor, counts: Tensor | None = None
) -> Tensor:
    """Return the sigmoid cross-entropy of logits (R, K + 1): mean over R of sums over `classes`."""
    logits = at_least_float32(logits[:, :-1])
    truth = labels[:, None] == torch.arange(logits.shape[1], device=labels.device)
    loss = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="none")
    loss = torch.where(classes[:-1], loss, 0.0).sum(dim=1)
    return _sum(loss, counts) / _number(labels, counts)


def objectness(
    logits: Tensor, truth: Tensor, number: int | Tensor, counts: Tensor | None = None
) -> Tensor:
    """Return the binary cross-entropy of logits and truth (...), summed and divided by `number`."""
    logits = at_least_float32(logits)
    loss = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="none")
    return _sum(loss, counts) / number


def box_l1(
    deltas: Tensor, targets: Tensor, number: int | Tensor, counts: Tensor | None = None
) -> Tensor:
    """Return the summed L1 distance of deltas and targets (..., 4), divided by max(number, 1)."""
    loss = (at_least_float32(deltas) - targets).abs().sum(dim=-1)
    return _sum(loss, counts) / torch.as_tensor(number).clamp(min=1)


def mask_bce(logits: Tensor, targets: Tensor, counts: Tensor | None = None) -> Tensor:
    """Return the mean binary cross-entropy of logits and targets (R, s, s)."""
    logits = at_least_float32(logits)
    loss = F.binary_cross_entropy_with_logits(logits, targets.to(logits.dtype), reduction="none")
    cells = loss.shape[1:].numel()
    return _sum(loss.flatten(1).sum(dim=1), counts) / (_number(loss, counts) * cells)


def _sum(loss: Tensor, counts: Tensor | None) -> Tensor:
    return (loss if counts is None else torch.where(counts, loss, 0.0)).sum()


def _number(rows: Tensor, counts: Tensor | None) -> int | Tensor:
    """Return how many rows contribute to a loss, at least 1."""
    return max(len(rows), 1) if counts is None else counts.sum().clamp(min=1)


class SoftmaxClassification(nn.Module):
    """Softmax over the classes and the background, for COCO."""

    def __init__(self, *, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes

    loss = staticmethod(classification)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Map logits (..., K + 1) to class probabilities (..., K), without the background."""
        return logits.float().softmax(dim=-1)[..., :-1]


class FederatedClassification(nn.Module):
    """Independent binary classifiers, with a loss over a sample of the classes, for LVIS.

    `class_weights` (K,) and `draw` are arguments of `federated_classes`; in the published models, a
    class has the weight image_count ** 0.5.
    """

    class_weights: Tensor

    def __init__(self, *, class_weights: Tensor, num: int, draw: bool = True) -> None:
        super().__init__()
        self.num_classes, self.num, self.draw = len(class_weights), num, draw
        self.register_buffer("class_weights", class_weights)

    def loss(self, logits: Tensor, labels: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return the loss of logits (R, K + 1) and labels (R,) over newly sampled classes."""
        classes = federated_classes(labels, self.class_weights, self.num, self.draw, counts)
        return federated_classification(logits, labels, classes, counts)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Map logits (..., K + 1) to class probabilities (..., K)."""
        return logits.float().sigmoid()[..., :-1]
