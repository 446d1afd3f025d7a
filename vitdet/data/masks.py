"""The forms of a mask: annotation -> directed edges; predicted 28 x 28 grid -> bitmap on an image -> RLE.

Edges move with an affine as points do and stay exact at any scale. The paste follows Detectron2's
`paste_masks_in_image`: bilinear at pixel centres, zero outside the grid.
Letters: G objects, E edges, N detections, H, W pixels of the image.
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
    """Outlines of COCO polygons or RLEs on an image of height x width, as `types.Polygons.of` takes them: edges (E, 4)
    float32 of all objects one after the other, x0, y0, x1, y1 in pixels, parts closed and turning alike; and how many
    are each object's, (G,) int64. None has no edges.

    Raises ValueError for an RLE of another size.
    """
    outlines = [outline(one, height, width) for one in segmentations]
    counts = np.array([len(lines) for lines in outlines], np.int64)
    return np.concatenate([np.zeros((0, 4)), *outlines], dtype=np.float32), counts


def outline(segmentation: list | dict | None, height: int, width: int) -> np.ndarray:
    """The directed edges (E, 4) of one object: of its polygons, or of the pixels of its RLE; none without both."""
    if segmentation is None:
        return np.zeros((0, 4))
    if isinstance(segmentation, dict):
        pixels = decode(segmentation, height, width)
        rows, columns = (np.flatnonzero(pixels.any(axis=axis)) for axis in (1, 0))
        if len(rows) == 0:
            return np.zeros((0, 4))
        top, left = rows[0], columns[0]
        pixels = pixels[top : rows[-1] + 1, left : columns[-1] + 1]
        # axes exchanged, and turned round so that the outline closes
        across = _steps(pixels.T)[:, [3, 2, 1, 0]]
        return np.concatenate([_steps(pixels), across]) + np.array([left, top, left, top])
    return np.concatenate([_closed(part) for part in segmentation])


def rectangles(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The outlines of boxes (G, 4) xyxy, as those of `edges_of`: edges (4 G, 4), 4 of each."""
    x0, y0, x1, y1 = boxes.T
    edges = [[x0, y0, x1, y0], [x1, y0, x1, y1], [x1, y1, x0, y1], [x0, y1, x0, y0]]
    return np.moveaxis(np.array(edges), 2, 0).reshape(-1, 4), np.full(len(boxes), 4)


def decode(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    """Pixels (H, W) bool of COCO polygons (as pycocotools draws them) or of an RLE, compressed or not.

    Raises ValueError for an RLE of another size.
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
    """COCO's compressed RLE dicts (counts as str, ready for JSON) of bitmaps (N, H, W) bool."""
    pixels = bitmaps.cpu().numpy().view(np.uint8)
    # one by one: the copy stays in the cache
    encoded = [rle.encode(np.asfortranarray(one)) for one in pixels]
    return [
        {"size": [int(side) for side in one["size"]], "counts": one["counts"].decode("ascii")}
        for one in encoded
    ]


@torch.no_grad()
def paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Bitmaps (N, H, W) bool of masks (N, M, M) probabilities put into boxes (N, 4) xyxy on an image of (H, W) `size`,
    all on the CPU.

    A pixel belongs to the mask where the probability at its centre is at least `threshold` (above 0).
    """
    height, width = size
    pasted = torch.zeros(len(masks), height, width, dtype=torch.bool)
    low = (boxes[:, :2].floor() - 1).clamp(min=0).long()
    high = torch.minimum(boxes[:, 2:].ceil().long() + 1, torch.tensor([width, height]))
    for index, (x0, y0, x1, y1) in enumerate(torch.cat([low, high], dim=1).tolist()):
        if x0 < x1 and y0 < y1:  # outside this region all is zero
            pasted[index, y0:y1, x0:x1] = (
                _sample(masks[index], boxes[index], (x0, y0, x1, y1)) >= threshold
            )
    return pasted


def _sample(mask: Tensor, box: Tensor, region: tuple[int, int, int, int]) -> Tensor:
    """Probabilities (h, w) of one mask at the pixel centres of a region x0, y0, x1, y1."""
    x0, y0, x1, y1 = region
    box = box.float()
    low, sides = box[:2], (box[2:] - box[:2]).clamp(min=1e-9)  # an empty box holds no pixel centre
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
    forward = np.dot(x - x[0], next_y) >= np.dot(next_x - x[0], y)  # twice the signed area
    return np.stack([x, y, next_x, next_y] if forward else [next_x, next_y, x, y], axis=1)


def _steps(pixels: np.ndarray) -> np.ndarray:
    """The vertical borders of pixels (H, W) bool as edges (E, 4): downwards where the mask begins, upwards where it
    ends; unit edges that follow one another are one.
    """
    height, _ = pixels.shape
    change = np.diff(np.pad(pixels, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    # a zero ends each column, so that no run leaves it
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
