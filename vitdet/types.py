"""Data structures exchanged between modules.

Boxes are half-open xyxy in float pixels, sizes are (height, width), labels are 0..K-1, and images
are RGB. Notation: B images, G ground-truth objects, N detections, E edges, K classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL import Image


@dataclass(frozen=True)
class Record:
    """Base class of dataclasses whose fields may be tensors, records and lists of records."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return a copy with all tensors moved to `device`."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, list):
                moved[field.name] = [item.to(device, non_blocking) for item in value]
            elif hasattr(value, "to"):
                moved[field.name] = value.to(device, non_blocking=non_blocking)
        return replace(self, **moved)


@dataclass(frozen=True, init=False)
class Polygons(Record):
    """Outlines of G objects as directed edges.

    Attributes:
        edges: (E, 4) float x0, y0, x1, y1 in canvas pixels; indexing does not copy the edges.
        spans: (G, 2) int64; object i consists of edges[spans[i, 0] : spans[i, 1]].

    A point is inside an object if the winding number of the object's edges around the point is not
    zero. All polygons of an object have the same orientation, so that their union is inside.
    """

    edges: Tensor
    spans: Tensor

    def __init__(self, edges: Tensor, spans: Tensor | None = None) -> None:
        """If `spans` is None, `edges` must be (G, E, 4); all-zero edges are padding."""
        if spans is None:
            length = edges.shape[1]
            first = torch.arange(len(edges), device=edges.device) * length
            edges, spans = edges.reshape(-1, 4), torch.stack([first, first + length], dim=1)
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "spans", spans)

    @classmethod
    def of(cls, edges: Tensor, counts: Tensor) -> Polygons:
        """Build outlines from edges (E, 4), in object order, and the objects' edge counts (G,)."""
        ends = counts.cumsum(0)
        return cls(edges, torch.stack([ends - counts, ends], dim=1))

    @classmethod
    def batch(cls, images: Sequence[Polygons], slots: int) -> Polygons:
        """Pad each image to `slots` objects with empty objects, and concatenate the outlines."""
        starts, spans = 0, []
        for image in images:
            spans.append(F.pad(image.spans + starts, (0, 0, 0, slots - len(image))))
            starts += len(image.edges)
        return cls(torch.cat([image.edges for image in images]), torch.cat(spans))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Tensor | slice) -> Polygons:
        return Polygons(self.edges, self.spans[index])


@dataclass(frozen=True)
class Target(Record):
    """Ground truth of one image.

    boxes (G, 4) are xyxy in canvas pixels, labels (G,) are int64, and masks are G outlines.
    has_mask (G,) bool marks the objects whose outline is annotated and used; None: all.
    """

    boxes: Tensor
    labels: Tensor
    masks: Polygons
    has_mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Target:
        has_mask = None if self.has_mask is None else self.has_mask[index]
        return Target(self.boxes[index], self.labels[index], self.masks[index], has_mask)


@dataclass(frozen=True)
class Targets(Record):
    """Ground truth of B images, padded to G objects per image.

    boxes are (B, G, 4), labels (B, G), present and has_mask (B, G) bool; masks are B * G outlines
    in image order. Padding has present=False, a zero box (IoU 0 with any box) and no outline.
    """

    boxes: Tensor
    labels: Tensor
    present: Tensor
    has_mask: Tensor
    masks: Polygons

    @classmethod
    def of(cls, targets: Sequence[Target], slots: int = 1) -> Targets:
        """Pad targets to the largest number of objects per image, but at least to `slots`."""
        slots = max(slots, *(len(target) for target in targets))

        def stacked(images: Sequence[Tensor]) -> Tensor:
            ends = [(*[0] * (2 * rows.dim() - 1), slots - len(rows)) for rows in images]
            return torch.stack([F.pad(rows, end) for rows, end in zip(images, ends, strict=True)])

        present = [torch.ones_like(target.labels, dtype=torch.bool) for target in targets]
        has_mask = [
            every if target.has_mask is None else target.has_mask
            for target, every in zip(targets, present, strict=True)
        ]
        masks = targets[0].masks.batch([target.masks for target in targets], slots)
        boxes, labels = [target.boxes for target in targets], [target.labels for target in targets]
        return cls(stacked(boxes), stacked(labels), stacked(present), stacked(has_mask), masks)

    def __len__(self) -> int:
        return len(self.boxes)

    def tensors(self) -> tuple[Tensor, ...]:
        """Return all tensors in the order that `from_tensors` expects."""
        masks = (self.masks.edges, self.masks.spans)
        return (self.boxes, self.labels, self.present, self.has_mask, *masks)

    @classmethod
    def from_tensors(cls, *tensors: Tensor) -> Targets:
        """Rebuild the targets from the tensors that the method `tensors` returned."""
        boxes, labels, present, has_mask, edges, spans = tensors
        return cls(boxes, labels, present, has_mask, Polygons(edges, spans))


@dataclass(frozen=True)
class Detections(Record):
    """Detections in one image, sorted by descending score.

    boxes (N, 4) are xyxy in pixels, scores (N,) in 0..1, and labels (N,) int64 indices into
    class_names. masks (N, 28, 28) contain probabilities on a grid over each box (see
    `vitdet.data.masks.paste`), or are None if the model has no mask head."""

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Detections:
        masks = None if self.masks is None else self.masks[index]
        rows = self.boxes[index], self.scores[index], self.labels[index]
        return Detections(*rows, masks, self.class_names)

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def draw(self, image: str | Path | Image.Image | np.ndarray | Tensor) -> Image.Image:
        """Draw detections on a copy of `image` (any input of `Predictor`), enlarged if small."""
        from vitdet.visualize import draw

        return draw(image, self)


@dataclass(frozen=True)
class Batch(Record):
    """A batch of B images.

    Attributes:
        images: (B, 3, S, S) uint8, padded to a square canvas.
        targets: ground truth of each image; an empty list for validation data.
        sizes: (B, 2) int64 (height, width) of each image on the canvas, without padding.
        image_ids: IDs in the annotation file.
        originals: (B, 2) int64 (height, width) of each image before resizing.
    """

    images: Tensor
    targets: list[Target]
    sizes: Tensor
    image_ids: tuple[int, ...] = ()
    originals: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """Return the batch with its images in pinned memory; called by DataLoader."""
        return replace(self, images=self.images.pin_memory())
