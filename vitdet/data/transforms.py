"""Augmentation by one affine map per image, which is applied to the pixels and the outlines.

Large-scale jitter (Ghiasi et al. 2021) follows Detectron2 (ResizeScale, FixedSizeCrop): one random
number determines both crop offsets. Independent offsets and resizing without antialiasing, as in
mmdet, are options. Axes are swapped first, and colors are changed last.
Notation: G objects, E edges of all objects, S canvas side. Sizes are (height, width)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

LUMA = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as in PIL
WEIGHT_ONE = 1 << 11  # fixed-point weight of 1 in `resize_bilinear`
ROWS = 16  # rows per block in `resize_bilinear`, so that a block fits in the CPU cache


@dataclass(frozen=True)
class Affine:
    """Affine map of an image: swap axes, flip, resize to `scaled`, crop to `size` at `offset`."""

    source: tuple[int, int]  # size of the original image
    scaled: tuple[int, int]  # size of the resized image
    offset: tuple[int, int]  # top and left of the crop
    size: tuple[int, int]  # size of the crop
    flip: bool = False
    transpose: bool = False
    # factors of brightness, contrast, saturation
    colors: tuple[float, float, float] = (1.0, 1.0, 1.0)

    def matrix(self) -> np.ndarray:
        """Return the matrix (2, 3) float64: output (x, y) = matrix @ input (x, y, 1)."""
        height, width = self.source[::-1] if self.transpose else self.source
        matrix = np.eye(2, 3)[::-1].copy() if self.transpose else np.eye(2, 3)
        if self.flip:
            matrix[0] = -matrix[0]
            matrix[0, 2] += width
        matrix[0] *= self.scaled[1] / width
        matrix[1] *= self.scaled[0] / height
        matrix[:, 2] -= self.offset[::-1]
        return matrix

    def seen(self, image: Image.Image, antialias: bool) -> Image.Image:
        """Apply the map and the color factors to an RGB image; return the crop."""
        if self.transpose:
            image = image.transpose(Image.Transpose.TRANSPOSE)
        if self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if antialias:
            (height, width), (top, left) = self.size, self.offset
            y, x = image.height / self.scaled[0], image.width / self.scaled[1]
            right = min((left + width) * x, image.width)
            bottom = min((top + height) * y, image.height)
            box = left * x, top * y, right, bottom
            image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
        else:
            crop = resize_bilinear(np.asarray(image), self.scaled, self.offset, self.size)
            image = Image.fromarray(crop)
        return change_colors(image, *self.colors)

    def edges(self, edges: np.ndarray) -> np.ndarray:
        """Transform edges (E, 4) xyxy to the canvas (float32); all-zero edges stay zero."""
        matrix = self.matrix()
        linear, shift = np.zeros((4, 4)), np.concatenate([matrix[:, 2], matrix[:, 2]])
        linear[:2, :2] = linear[2:, 2:] = matrix[:, :2].T
        moved = edges @ linear + shift
        moved *= edges.any(axis=1, keepdims=True)
        return moved.astype(np.float32)


def jitter(
    rng: np.random.Generator,
    source: tuple[int, int],
    canvas: int,
    *,
    scale_range: tuple[float, float],
    flip: float,
    transpose: float,
    color_jitter: float,
    diagonal: bool,
) -> Affine:
    """Draw a random affine map for an image.

    Args:
        source: (height, width) of the image.
        canvas: side of the square canvas in pixels.
        scale_range: the image is resized to fit a square of side s * canvas, s ~ U(scale_range).
        flip, transpose: probabilities of a horizontal flip and of swapping the axes.
        color_jitter: factors of brightness, contrast, saturation ~ U(1 - color_jitter, 1 +
            color_jitter).
        diagonal: whether to draw one number for both crop offsets (Detectron2) or two (mmdet).
    """
    draws = rng.random(8)  # always 8, so that no setting changes the draws used by other settings
    transposed = bool(draws[0] < transpose)
    shape = np.array(source[::-1] if transposed else source)
    scale = scale_range[0] + draws[2] * (scale_range[1] - scale_range[0])
    # np.round, as in Detectron2, rounds half to even
    scaled = np.maximum(np.round(shape * (canvas * scale / shape).min()), 1).astype(int)
    shares = draws[[3, 3]] if diagonal else draws[[3, 7]]
    offset = np.round(shares * np.maximum(scaled - canvas, 0)).astype(int)
    size = np.minimum(scaled, canvas)
    colors = tuple((1 + color_jitter * (2 * draws[4:7] - 1)).tolist())
    return Affine(
        source, _pair(scaled), _pair(offset), _pair(size), bool(draws[1] < flip), transposed, colors
    )


def resize_bilinear(
    image: np.ndarray,
    scaled: tuple[int, int],
    offset: tuple[int, int] = (0, 0),
    size: tuple[int, int] | None = None,
) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to `scaled` (height, width) without antialiasing, and crop.

    Computes only the crop of (height, width) `size` (None: no crop) at `offset` (top, left).
    Bit-identical to OpenCV's INTER_LINEAR (used by mmdet): four neighbors per output pixel at any
    scale, half-pixel centers, border replication, 11-bit weights.
    """
    height, width = size or scaled
    top, bottom, down = _neighbors(image.shape[0], scaled[0], offset[0], height)
    left, right, along = _neighbors(image.shape[1], scaled[1], offset[1], width)
    first = top.min()
    rows = image[first : bottom.max() + 1]
    columns = rows[:, left] * (WEIGHT_ONE - along)[:, None]
    columns += rows[:, right] * along[:, None]
    columns >>= 4
    seen = np.empty((height, width, 3), np.uint8)
    for start in range(0, height, ROWS):
        block = slice(start, start + ROWS)
        weight = down[block, None, None]
        above, below = columns[top[block] - first], columns[bottom[block] - first]
        above *= WEIGHT_ONE - weight
        above >>= 16
        below *= weight
        below >>= 16
        above += below
        above += 2
        above >>= 2
        seen[block] = above
    return seen


def _neighbors(
    source: int, scaled: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return, for each output pixel, two input indices and the weight of the second (count,)."""
    center = ((np.arange(start, start + count) + 0.5) * (source / scaled) - 0.5).astype(np.float32)
    low = np.floor(center)
    weight = np.rint((center - low) * np.float32(WEIGHT_ONE)).astype(np.int32)
    low = low.astype(np.int64)
    return low.clip(0, source - 1), (low + 1).clip(0, source - 1), weight


def fit(source: tuple[int, int], size: int) -> tuple[int, int]:
    """Scale (height, width) to longest side `size`; rounds like Detectron2's ResizeShortestEdge."""
    scale = size / min(source)
    height, width = scale * source[0], scale * source[1]
    shrink = size / max(height, width)
    if shrink < 1:
        height, width = height * shrink, width * shrink
    return max(int(height + 0.5), 1), max(int(width + 0.5), 1)


def resize_longest(image: Image.Image | np.ndarray, size: int, antialias: bool) -> np.ndarray:
    """Resize an RGB image or array (H, W, 3) uint8 bilinearly to longest side `size`.

    The result equals PIL's with antialiasing, and OpenCV's without antialiasing."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    height, width = fit((image.height, image.width), size)
    if not antialias:
        return resize_bilinear(np.asarray(image), (height, width))
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))


def resize_and_pad(
    image: Image.Image | np.ndarray, size: int, antialias: bool, canvas: np.ndarray | None = None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Resize an RGB image or array (H, W, 3) uint8 to longest side `size`; pad to a square.

    `canvas` is a black canvas (3, size, size) uint8; by default, a canvas is created. Returns the
    canvas and the (height, width) without padding.
    """
    resized = resize_longest(image, size, antialias)
    canvas = np.zeros((3, size, size), np.uint8) if canvas is None else canvas
    pad(Image.fromarray(resized), canvas)
    return canvas, resized.shape[:2]


def pad(image: Image.Image, canvas: np.ndarray) -> None:
    """Write an RGB image to the top-left corner of a black canvas (3, S, S) uint8."""
    # copying planes is three times as fast as transposing an array
    for plane, band in zip(canvas, image.split(), strict=True):
        plane[: image.height, : image.width] = band


def visible_boxes(
    edges: np.ndarray, counts: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return the box around the visible part of each outline in an image of (height, width) `size`.

    Args:
        edges: (E, 4), ordered by object.
        counts: (G,) number of edges of each object.

    Returns:
        The boxes (G, 4) float32 xyxy, and whether both sides of each box exceed 1e-5, (G,) bool.
    """
    real = np.any(edges, axis=1, keepdims=True)
    start, end = edges[:, :2], edges[:, 2:]
    low = _reduce(np.minimum, np.where(real, np.minimum(start, end), np.inf), counts, np.inf)
    high = _reduce(np.maximum, np.where(real, np.maximum(start, end), -np.inf), counts, -np.inf)
    window = np.array(size[::-1], np.float64)
    cut = np.any((low < 0) | (high > window), axis=1)
    if cut.any():
        of_cut = np.repeat(cut, counts)
        low[cut], high[cut] = _clipped(
            edges[of_cut].astype(np.float64), real[of_cut], counts[cut], window
        )
    boxes = np.concatenate([low, high], axis=1).astype(np.float32)
    keep = np.all(boxes[:, 2:] - boxes[:, :2] > 1e-5, axis=1)
    return boxes, keep


def change_colors(
    image: Image.Image, brightness: float, contrast: float, saturation: float
) -> Image.Image:
    """Scale brightness, then contrast, then saturation, using a single color matrix."""
    if brightness == contrast == saturation == 1:
        return image
    gray = brightness * float(np.asarray(image.convert("L")).mean())
    matrix = brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * LUMA)
    rows = np.concatenate([matrix, np.full((3, 1), (1 - contrast) * gray)], axis=1)
    return image.convert("RGB", tuple(rows.ravel().tolist()))


def _pair(values: np.ndarray) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _reduce(ufunc: np.ufunc, values: np.ndarray, counts: np.ndarray, empty: float) -> np.ndarray:
    """Reduce edge values (E, D) by object to (G, D); an object without edges gets `empty`."""
    found = np.full((len(counts), values.shape[1]), empty, values.dtype)
    some = counts > 0
    if some.any():
        found[some] = ufunc.reduceat(values, (counts.cumsum() - counts)[some], axis=0)
    return found


def _clipped(
    edges: np.ndarray, real: np.ndarray, counts: np.ndarray, window: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the minimum and maximum corners (G, 2) of each outline's intersection with the window.

    The vertices of the intersection are the ends of the clipped edges and the corners of the window
    that are inside the outline.
    """
    start, along = edges[:, :2], edges[:, 2:] - edges[:, :2]
    along = np.where(along == 0, 1e-12, along)
    bounds = np.sort(np.stack([-start / along, (window - start) / along]), axis=0)
    enter = bounds[0].max(axis=1, keepdims=True).clip(min=0)
    leave = bounds[1].min(axis=1, keepdims=True).clip(max=1)
    seen = real & (enter <= leave)
    pieces = np.stack([start + enter * along, start + leave * along]).clip(0, window)
    low = _reduce(np.minimum, np.where(seen, pieces, np.inf).min(axis=0), counts, np.inf)
    high = _reduce(np.maximum, np.where(seen, pieces, -np.inf).max(axis=0), counts, -np.inf)
    corners = window * np.array([[0, 0], [0, 1], [1, 0], [1, 1]])
    inside = _winding(edges, counts, corners)[:, :, None] != 0
    low = np.minimum(low, np.where(inside, corners, np.inf).min(axis=1))
    high = np.maximum(high, np.where(inside, corners, -np.inf).max(axis=1))
    return low, high


def _winding(edges: np.ndarray, counts: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return the winding numbers (G, P) of outlines around points (P, 2)."""
    x0, y0, x1, y1 = edges.T[:, :, None]
    x, y = points.T
    down, up = (y0 <= y) & (y < y1), (y1 <= y) & (y < y0)
    side = (x1 - x0) * (y - y0) - (x - x0) * (y1 - y0)
    turns = (down & (side > 0)).astype(np.int64) - (up & (side < 0))
    return _reduce(np.add, turns, counts, 0)
