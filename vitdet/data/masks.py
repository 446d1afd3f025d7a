"""Conversion of annotated masks to directed edges, and of predicted masks to bitmaps and RLEs.

Edges are transformed like points and stay exact at any scale. `paste` follows Detectron2's
`paste_masks_in_image`: bilinear sampling at pixel centers, zero outside the grid.
Notation: G objects, E edges, N detections, M side of the mask grid, H and W sides of the image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from pycocotools import mask as rle
from torch import Tensor


def edges_of(
    segmentations: Sequence[list | dict | None], height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Convert COCO polygons or RLEs to the edges and counts that `types.Polygons.of` expects.

    Args:
        segmentations: one per object; None yields no edges.

    Returns:
        Edges (E, 4) float32 x0, y0, x1, y1 in pixels, and the number of edges of each object (G,)
        int64. The edges form closed outlines of the same orientation (holes of an RLE: reversed).

    Raises:
        ValueError: if an RLE has a different size than the image.
    """
    outlines = [outline(segmentation, height, width) for segmentation in segmentations]
    counts = np.array([len(lines) for lines in outlines], np.int64)
    return np.concatenate([np.zeros((0, 4)), *outlines], dtype=np.float32), counts


def outline(segmentation: list | dict | None, height: int, width: int) -> np.ndarray:
    """Return the outline of an object's polygons or RLE as directed edges (E, 4)."""
    if segmentation is None:
        return np.zeros((0, 4))
    if isinstance(segmentation, dict):
        pixels = decode(segmentation, height, width)
        rows, columns = (np.flatnonzero(pixels.any(axis=axis)) for axis in (1, 0))
        if len(rows) == 0:
            return np.zeros((0, 4))
        top, left = rows[0], columns[0]
        pixels = pixels[top : rows[-1] + 1, left : columns[-1] + 1]
        # horizontal borders: transpose, and reverse the edges so that the outline closes
        across = _steps(pixels.T)[:, [3, 2, 1, 0]]
        return np.concatenate([_steps(pixels), across]) + np.array([left, top, left, top])
    return np.concatenate([_closed(part) for part in segmentation])


def rectangles(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the edges (4 G, 4) of boxes (G, 4) xyxy and the number of edges per box."""
    x0, y0, x1, y1 = boxes.T
    edges = [[x0, y0, x1, y0], [x1, y0, x1, y1], [x1, y1, x0, y1], [x0, y1, x0, y0]]
    return np.moveaxis(np.array(edges), 2, 0).reshape(-1, 4), np.full(len(boxes), 4)


def decode(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Decode COCO polygons or an RLE, compressed or not, to pixels (H, W) bool, with pycocotools.

    Raises ValueError for an RLE whose size is not (height, width).
    """
    if isinstance(segmentation, list):
        return rle.decode(rle.merge(rle.frPyObjects(segmentation, height, width))).astype(bool)
    if list(segmentation["size"]) != [height, width]:
        raise ValueError(
            f"RLE of size {segmentation['size']}, expected {[height, width]} (height, width)"
        )
    if isinstance(segmentation["counts"], list):
        segmentation = rle.frPyObjects(segmentation, height, width)
    return rle.decode(segmentation).astype(bool)


def encode(bitmaps: Tensor) -> list[dict]:
    """Encode bitmaps (N, H, W) bool as COCO's compressed RLE dicts (counts as str, for JSON)."""
    pixels = bitmaps.cpu().numpy().view(np.uint8)
    # encode one bitmap at a time, so that its copy fits in the CPU cache
    encoded = [rle.encode(np.asfortranarray(bitmap)) for bitmap in pixels]
    return [
        {"size": [int(side) for side in code["size"]], "counts": code["counts"].decode("ascii")}
        for code in encoded
    ]


@torch.no_grad()
def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Return bitmaps (N, H, W) bool of probability masks (N, M, M) pasted into boxes (N, 4) xyxy.

    A pixel is set if the probability at its center is at least `threshold`, which must be above 0.
    `size` is the (H, W) of the image. All tensors must be on the CPU.
    """
    height, width = size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool)
    low = (boxes[:, :2].floor() - 1).clamp(min=0).long()
    high = torch.minimum(boxes[:, 2:].ceil().long() + 1, torch.tensor([width, height]))
    for index, (x0, y0, x1, y1) in enumerate(torch.cat([low, high], dim=1).tolist()):
        if x0 < x1 and y0 < y1:  # the probability is zero outside this region
            pasted[index, y0:y1, x0:x1] = (
                _sample(masks[index], boxes[index], (x0, y0, x1, y1)) >= threshold
            )
    return pasted


def _sample(mask: Tensor, box: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    """Return probabilities (h, w) of a mask at the pixel centers of a region x0, y0, x1, y1."""
    x0, y0, x1, y1 = region
    box = box.float()
    low, sides = box[:2], (box[2:] - box[:2]).clamp(min=1e-9)  # avoid division by 0
    x = (torch.arange(x0, x1, dtype=torch.float32) + 0.5 - low[0]) / sides[0] * 2 - 1
    y = (torch.arange(y0, y1, dtype=torch.float32) + 0.5 - low[1]) / sides[1] * 2 - 1
    grid = torch.stack([x.expand(y1 - y0, -1), y[:, None].expand(-1, x1 - x0)], dim=2)
    return F.grid_sample(
        mask.float()[None, None], grid[None], padding_mode="zeros", align_corners=False
    )[0, 0]


def _closed(part: Sequence[float]) -> np.ndarray:
    flat = np.asarray(part, np.float64)
    x, y = flat[0::2], flat[1::2]
    next_x, next_y = np.append(x[1:], x[0]), np.append(y[1:], y[0])
    forward = np.dot(x - x[0], next_y) >= np.dot(next_x - x[0], y)  # signed area >= 0
    return np.stack([x, y, next_x, next_y] if forward else [next_x, next_y, x, y], axis=1)


def _steps(pixels: np.ndarray) -> np.ndarray:
    """Return the vertical borders of pixels (H, W) bool as edges (E, 4).

    The edges point down at left borders and up at right borders; adjacent unit edges are merged.
    """
    height, _ = pixels.shape
    change = np.diff(np.pad(pixels, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    # the zero after each column ends the last run of the column
    columns = np.pad(change.T, ((0, 0), (0, 1))).ravel()
    starts = np.flatnonzero(np.diff(columns, prepend=0))
    ends = np.append(starts[1:], len(columns))
    value = columns[starts]
    starts, ends, value = starts[value != 0], ends[value != 0], value[value != 0]
    x, top = np.divmod(starts, height + 1)
    bottom = top + ends - starts
    return np.stack(
        [x, np.where(value > 0, top, bottom), x, np.where(value > 0, bottom, top)], axis=1
    )
