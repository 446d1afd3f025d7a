"""The three records that modules exchange: `Target`, `Detections` and `Batch`; and the form of a target's masks.

Boxes are xyxy in float pixels, half-open; sizes are (height, width); labels are 0..K-1; images are RGB.
Letters: B images, G ground truths, N detections, E edges, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from PIL import Image

Record = TypeVar("Record", "Polygons", "Target", "Detections", "Batch")


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
