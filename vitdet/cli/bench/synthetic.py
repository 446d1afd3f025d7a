"""Synthetic training images, which make benchmarks independent of reading and decoding data.

An image is smooth noise with about eight polygons. Each polygon has one color and 8 to 40 points.
The number and sizes of objects are similar to those in COCO after scale jitter. With random
weights, proposals miss the objects, and the mask head would process hardly any RoIs. Therefore
`lay_on_objects` makes the RPN return proposals that overlap the objects.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from vitdet.data.dataset import Sample, make_batch
from vitdet.data.masks import edges_of
from vitdet.models import Detector
from vitdet.models.rpn import Anchored, Proposals
from vitdet.types import Batch, Polygons, Target

OBJECTS = 8.0  # mean number of objects per image
SIDES = (0.04, 0.5)  # range of the width and height of a polygon, relative to the image side
ORIGINAL = 0.54  # side of the original image / canvas side: 553 / 1024, about the area of 640 x 480
CELL = 32  # cell size of the noise, in pixels
SHARE = 0.2  # share of proposals that overlap objects
SHIFT = 0.09  # coordinate noise: standard deviation / box side, for IoUs of about 0.6 to 0.9


def make_images(size: int, side: int, classes: int, seed: int = 0) -> Batch:
    """Return a batch of `size` square images of `side` pixels, in pinned memory if a GPU exists."""

    def draw(index: int, canvas: np.ndarray) -> Sample:
        return _draw(np.random.default_rng((seed, index)), canvas, classes, index)

    batch = make_batch(draw, range(size), side)
    return batch.pin_memory() if torch.cuda.is_available() else batch


def boxes_on_objects(boxes: Tensor, count: int, side: int, seed: int = 0) -> Tensor:
    """Return boxes (count, 4) that overlap `boxes` (G, 4), like proposals of a trained detector."""
    generator = torch.Generator().manual_seed(seed)
    chosen = boxes[torch.arange(count) % len(boxes)]
    sides = (chosen[:, 2:] - chosen[:, :2]).repeat(1, 2)
    moved = chosen + SHIFT * sides * torch.randn(count, 4, generator=generator)
    return moved.clamp(0, side)


def lay_on_objects(detector: Detector, batch: Batch, device: torch.device) -> None:
    """Make the RPN replace a share of its proposals with boxes that overlap objects in `batch`."""
    propose, most = detector.rpn.propose, detector.rpn.top_train[1]
    side, count = batch.images.shape[-1], max(1, int(SHARE * most))
    laid = torch.stack([boxes_on_objects(target.boxes, count, side) for target in batch.targets])
    laid = laid.to(device)

    def proposals(found: Anchored, sizes: Tensor, top: tuple[int, int]) -> Proposals:
        proposed = propose(found, sizes, top)
        kept = proposed.filled[:, :-count]
        return proposed._replace(
            boxes=torch.cat([proposed.boxes[:, :-count], laid], dim=1),
            filled=torch.cat([kept, kept.new_ones(len(kept), count)], dim=1),
        )

    detector.rpn.propose = proposals  # type: ignore[method-assign]


def _draw(rng: np.random.Generator, canvas: np.ndarray, classes: int, image_id: int) -> Sample:
    """Draw a random image on `canvas` (3, S, S) uint8; return its sample, see `Sample`."""
    side = canvas.shape[1]
    cells = rng.integers(64, 192, (max(side // CELL, 1), max(side // CELL, 1), 3), np.uint8)
    picture = Image.fromarray(cells).resize((side, side), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    outlines = [_outline(rng, side) for _ in range(1 + rng.poisson(OBJECTS - 1))]
    for outline in outlines:
        color = tuple(int(value) for value in rng.integers(0, 256, 3))
        pen.polygon([(x, y) for x, y in outline.tolist()], fill=color)
    canvas[:] = np.asarray(picture).transpose(2, 0, 1)
    edges, counts = edges_of([[points.ravel().tolist()] for points in outlines], side, side)
    boxes = np.array([[*points.min(0), *points.max(0)] for points in outlines], np.float32)
    target = Target(
        torch.from_numpy(boxes),
        torch.from_numpy(rng.integers(0, classes, len(outlines))),
        Polygons.of(torch.from_numpy(edges), torch.from_numpy(counts)),
    )
    return target, (side, side), image_id, (round(ORIGINAL * side),) * 2


def _outline(rng: np.random.Generator, side: int) -> np.ndarray:
    """Return the points (P, 2) of a random polygon in an image of `side` pixels."""
    low, high = np.log(SIDES)
    sides = np.exp(rng.uniform(low, high, 2)) * side
    corner = rng.uniform(0, 1, 2) * (side - sides)
    turns = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(8, 41)))
    radius = rng.uniform(0.7, 1.0, (len(turns), 1)) / 2
    directions = np.stack([np.cos(turns), np.sin(turns)], axis=1)
    return corner + sides * (0.5 + radius * directions)
