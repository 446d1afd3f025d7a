"""The records that modules exchange: `Target`, `Targets`, `Detections` and `Batch`; and the form of a target's masks.

Boxes are xyxy in float pixels, half-open; sizes are (height, width); labels are 0..K-1; images are RGB.
Letters: B images, G ground truths, N detections, E edges, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL import Image

Record = TypeVar("Record", "Polygons", "Target", "Targets", "Detections", "Batch")


def _to(record: Record, device: torch.device | str, non_blocking: bool) -> Record:
    moved: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, list):
            moved[field.name] = [item.to(device, non_blocking) for item in value]
        elif hasattr(value, "to"):
            moved[field.name] = value.to(device, non_blocking=non_blocking)
    return replace(record, **moved)


@dataclass(frozen=True, init=False)
class Polygons:
    """Outlines of G objects as directed edges, edges (E, 4) float: x0, y0, x1, y1 in pixels of the canvas.

    spans (G, 2) int64: the edges of an object are the rows from spans[:, 0] up to spans[:, 1]; a selection of
    objects shares the edges, so that objects with many edges are never repeated.
    A point is inside where the winding number of the edges around it is not zero. All parts of an object turn
    the same way, so overlapping parts unite.
    """

    edges: Tensor
    spans: Tensor

    def __init__(self, edges: Tensor, spans: Tensor | None = None) -> None:
        """Without spans, edges are (G, E, 4): objects with equally many, padded with zero edges, which no ray crosses."""
        if spans is None:
            each = edges.shape[1]
            first = torch.arange(len(edges), device=edges.device) * each
            edges, spans = edges.reshape(-1, 4), torch.stack([first, first + each], dim=1)
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "spans", spans)

    @classmethod
    def of(cls, edges: Tensor, counts: Tensor) -> Polygons:
        """The outlines whose edges (E, 4) follow one another, counts (G,) int64 of each object."""
        ends = counts.cumsum(0)
        return cls(edges, torch.stack([ends - counts, ends], dim=1))

    @classmethod
    def batch(cls, images: Sequence[Polygons], slots: int) -> Polygons:
        """The outlines of several images as one record of `slots` objects an image; absent ones have no edges."""
        starts, spans = 0, []
        for image in images:
            spans.append(F.pad(image.spans + starts, (0, 0, 0, slots - len(image))))
            starts += len(image.edges)
        return cls(torch.cat([image.edges for image in images]), torch.cat(spans))

    def __len__(self) -> int:
        return len(self.spans)

    def __getitem__(self, index: Tensor | slice) -> Polygons:
        return Polygons(self.edges, self.spans[index])

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Polygons:
        return _to(self, device, non_blocking)


@dataclass(frozen=True)
class Target:
    """Ground truth of one image: boxes (G, 4) xyxy pixels of the canvas, labels (G,) int64, masks of G objects.

    has_mask (G,) bool: which objects have an annotated outline, None if all have; the masks of others are not used.
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

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Target:
        return _to(self, device, non_blocking)


@dataclass(frozen=True)
class Targets:
    """Ground truth of B images in tensors of one size: boxes (B, G, 4), labels (B, G), present and has_mask (B, G) bool.

    masks: of all B G objects, those of an image one after the other. An absent object has a box of zeros, which
    overlaps no box, and no outline.
    """

    boxes: Tensor
    labels: Tensor
    present: Tensor
    has_mask: Tensor
    masks: Polygons

    @classmethod
    def of(cls, targets: Sequence[Target], slots: int = 1) -> Targets:
        """The targets of a batch, with at least `slots` objects an image; more if one of the images has more."""
        slots = max(slots, *(len(target) for target in targets))

        def padded(rows: Tensor) -> Tensor:
            return F.pad(rows, (*[0] * (2 * rows.dim() - 1), slots - len(rows)))

        present = [torch.ones_like(target.labels, dtype=torch.bool) for target in targets]
        has_mask = [
            there if target.has_mask is None else target.has_mask
            for target, there in zip(targets, present, strict=True)
        ]
        return cls(
            boxes=torch.stack([padded(target.boxes) for target in targets]),
            labels=torch.stack([padded(target.labels) for target in targets]),
            present=torch.stack([padded(there) for there in present]),
            has_mask=torch.stack([padded(mask) for mask in has_mask]),
            masks=targets[0].masks.batch([target.masks for target in targets], slots),
        )

    def __len__(self) -> int:
        return len(self.boxes)

    def tensors(self) -> tuple[Tensor, ...]:
        """All that it holds, as `from_tensors` takes it."""
        masks = (self.masks.edges, self.masks.spans)
        return (self.boxes, self.labels, self.present, self.has_mask, *masks)

    @classmethod
    def from_tensors(
        cls,
        boxes: Tensor,
        labels: Tensor,
        present: Tensor,
        has_mask: Tensor,
        edges: Tensor,
        spans: Tensor,
    ) -> Targets:
        """The inverse of `tensors`."""
        return cls(boxes, labels, present, has_mask, Polygons(edges, spans))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        return _to(self, device, non_blocking)


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first.

    boxes (N, 4) xyxy pixels, scores (N,) in 0..1, labels (N,) int64, masks (N, 28, 28) probabilities inside the box
    (they are put onto the image by `vitdet.data.masks.paste`), None if the detector has no mask head;
    class_names[label] is a label's name.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    masks: Tensor | None
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, index: Tensor | slice) -> Detections:
        return Detections(
            self.boxes[index],
            self.scores[index],
            self.labels[index],
            None if self.masks is None else self.masks[index],
            self.class_names,
        )

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Detections:
        return _to(self, device, non_blocking)

    @property
    def names(self) -> list[str]:
        """The class name of each detection."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def draw(self, image: str | Path | Image.Image | np.ndarray | Tensor) -> Image.Image:
        """The image (anything that `Predictor` takes) with boxes, masks, names and scores on it."""
        from vitdet.visualize import draw

        return draw(image, self)


@dataclass(frozen=True)
class Batch:
    """images (B, 3, H, W) uint8 on a square canvas, a target an image, sizes (B, 2) int64 (height, width) unpadded,
    image_ids of the annotation file, originals (B, 2) int64 (height, width) of the files before any resize.
    """

    images: Tensor
    targets: list[Target]
    sizes: Tensor
    image_ids: tuple[int, ...] = ()
    originals: Tensor | None = None

    def __len__(self) -> int:
        return len(self.images)

    def pin_memory(self) -> Batch:
        """With the images where a GPU fetches them without waiting; what a DataLoader asks for."""
        return replace(self, images=self.images.pin_memory())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        return _to(self, device, non_blocking)
