"""The two Triton kernels of `vitdet.kernels.roi_align`, and their launches.

RoIAlign is linear and separable: a bin's value is a sum over cells, each weighted by the product of
a row weight and a column weight. The values of 64 bins are the product of a weight matrix (bins x
cells) with a tile of 8 x 8 cells (cells x channels), summed over the tiles that the RoI touches.
The gradient of a tile is the product of the transposed matrix with the gradients of the bins,
summed in a fixed order over the RoIs that touch the tile; each cell is written once.

In products with 16-bit maps, each float32 weight is represented as the sum of two 16-bit numbers,
to preserve its precision.

Notation: B images, R RoIs, C channels, H x W cells of a map, L levels.
"""

# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

LEVELS = 5
SIDE = tl.constexpr(8)  # side of a tile of cells
TILE = 64  # bins per matrix product
ROIS = 256  # RoIs that a program of the backward kernel processes per iteration
WIDE = 256  # maximum number of channels per program with 16-bit maps
# arguments that vary between batches, for which Triton must not compile specialized kernels
SIZES = [*(f"{axis}{level}" for axis in "hws" for level in range(LEVELS)), "levels", "images"]
# RoIs are skipped if |x0| + |y0| + |x1| + |y1|, in cells, is at least this limit
LARGEST = tl.constexpr(2.0**30)


def forward(
    maps: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    bins: int,
    ratio: int,
) -> Tensor:
    """Return the RoIs' features (R, bins, bins, C), given contiguous maps (B, H, W, C)."""
    channels = maps[0].shape[3]
    out = maps[0].new_empty(len(boxes), bins, bins, channels)
    sizes = _sizes(out, bins, ratio)
    grid = (len(boxes), triton.cdiv(bins, sizes["ROWS"]), triton.cdiv(channels, sizes["CHANNELS"]))
    if out.numel():
        given = boxes, image, level, out, channels
        roi_align_forward[grid](*_levels(maps, strides), *given, **sizes)
    return out


def backward(
    gradient: Tensor,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    shapes: Sequence[tuple[int, int]],
    images: int,
    strides: Sequence[int],
    ratio: int,
) -> list[Tensor]:
    """Return the maps' gradients (B, H, W, C) for a contiguous gradient (R, bins, bins, C)."""
    bins, channels = gradient.shape[2:]
    found = [gradient.new_empty(images, *shape, channels) for shape in shapes]
    # group RoIs by image and level, so that a program iterates only over RoIs on its map
    exists = (level >= 0) & (level < len(shapes))
    of, order = torch.where(exists, image * len(shapes) + level, -1).sort(stable=True)
    first = torch.searchsorted(of, torch.arange(images * len(shapes) + 1, device=of.device))
    sizes = _sizes(gradient, bins, ratio)
    tiles = sum(triton.cdiv(h, SIDE.value) * triton.cdiv(w, SIDE.value) for h, w in shapes)
    if images * tiles * channels:
        grid = (images * tiles, triton.cdiv(channels, sizes["CHANNELS"]))
        given = boxes, order, first, gradient, images, channels
        roi_align_backward[grid](*_levels(found, strides), *given, **sizes, ROIS=ROIS)
    return found


def _levels(maps: Sequence[Tensor], strides: Sequence[int]) -> list[Any]:
    """Return maps, heights, widths and 1 / strides, padded to LEVELS each, and the map count."""
    rows = [(x, *x.shape[1:3], 1 / stride) for x, stride in zip(maps, strides, strict=True)]
    rows += rows[:1] * (LEVELS - len(rows))
    return [value for column in zip(*rows, strict=True) for value in column] + [len(maps)]


def _sizes(rois: Tensor, bins: int, ratio: int) -> dict[str, int]:
    """Return the kernels' constants; `rois` are features or their gradients (R, bins, bins, C)."""
    columns = max(4, triton.next_power_of_2(bins))
    most = WIDE if rois.element_size() == 2 else WIDE // 4
    return {
        "BINS": bins,
        "ROWS": max(1, TILE // columns),
        "COLUMNS": columns,
        "RATIO": ratio,
        "CHANNELS": min(most, max(16, triton.next_power_of_2(rois.shape[3]))),
        "num_warps": 4,
        "num_stages": 2,
    }


@triton.jit
def choose(level, v0, v1, v2, v3, v4):
    """Return the value of v0 to v4 that belongs to `level`."""
    low = tl.where(level == 1, v1, v0)
    high = tl.where(level == 3, v3, tl.where(level == 4, v4, v2))
    return tl.where(level < 2, low, high)


@triton.jit
def extent(boxes, roi, exists, scale):
    """Return the corners of RoIs in cells: x0, y0, x1, y1."""
    x0 = tl.load(boxes + roi * 4, mask=exists, other=0.0) * scale - 0.5
    x1 = tl.load(boxes + roi * 4 + 2, mask=exists, other=0.0) * scale - 0.5
    y0 = tl.load(boxes + roi * 4 + 1, mask=exists, other=0.0) * scale - 0.5
    y1 = tl.load(boxes + roi * 4 + 3, mask=exists, other=0.0) * scale - 0.5
    return x0, y0, x1, y1


@triton.jit
def places(x, row, channel, channels):
    """Return the addresses (rows, channels) in x (., channels) of the given rows and channels."""
    return x + (row * channels)[:, None] + channel[None, :]


@triton.jit
def is_finite(x0, y0, x1, y1):
    """Return whether the coordinates of RoIs are in range; False for NaN."""
    return tl.abs(x0) + tl.abs(y0) + tl.abs(x1) + tl.abs(y1) < LARGEST


@triton.jit
def touched(start, end, length):
    """Return the first and last cell of 0..length-1 that points from start to end may read."""
    low, high = tl.minimum(start, end), tl.maximum(start, end)
    last = (length - 1).to(tl.float32)
    first = tl.minimum(tl.maximum(tl.floor(low), 0.0), last)
    last = tl.minimum(tl.maximum(tl.floor(high) + 1, 0.0), last)
    return first.to(tl.int32), last.to(tl.int32)


@triton.jit
def rows_touched(row, start, size, height, BINS: tl.constexpr, ROWS: tl.constexpr):
    """Return the first and last row of cells that ROWS rows of bins from `row` on may read."""
    return touched(start + row * size, start + tl.minimum(row + ROWS, BINS) * size, height)


@triton.jit
def points_of(size, RATIO: tl.constexpr):
    """Return the number of points per bin and axis: RATIO or, if RATIO is 0, `size` rounded up."""
    if RATIO > 0:
        return tl.full((), RATIO, tl.int32)
    else:
        return tl.maximum(tl.ceil(size), 0.0).to(tl.int32)


@triton.jit
def weights(cell, bin, start, size, length, RATIO: tl.constexpr):
    """Return the weight of each cell of an axis in each bin's mean; cells and bins are broadcast.

    A point between two cells reads both. Points up to one cell outside the map read the border
    cell, and points farther outside read nothing.
    """
    points = points_of(size, RATIO)
    count = tl.maximum(points, 1).to(tl.float32)
    origin = start + bin.to(tl.float32) * size
    at = cell.to(tl.float32)
    first = tl.zeros_like(bin + cell)
    steps = points
    if RATIO == 0:
        # Points are at least half a cell apart, so that at most 6 points can be near a cell.
        before = tl.math.div_rn(at - 1 - origin, size / count) - 0.5
        first = tl.minimum(tl.maximum(tl.floor(before), 0.0), LARGEST).to(tl.int32)
        steps = tl.minimum(points, 6)
    edge = (length - 1).to(tl.float32)
    total = tl.zeros_like(at + origin)
    for step in range(steps):
        index = first + step
        point = origin + tl.math.div_rn((index.to(tl.float32) + 0.5) * size, count)
        near = 1 - tl.abs(tl.minimum(tl.maximum(point, 0.0), edge) - at)
        counts = (index < points) & (point >= -1.0) & (point <= edge + 1) & (near > 0)
        total += tl.where(counts, near, 0.0)
    return total / count


@triton.jit
def add_product(total, matrix, values):
    """Return total + matrix (float32) @ values (any dtype), at the precision of the matrix."""
    if values.dtype == tl.float32:
        return tl.dot(matrix, values, total, input_precision="tf32x3")
    else:
        high = matrix.to(values.dtype)
        low = (matrix - high.to(tl.float32)).to(values.dtype)
        return tl.dot(low, values, tl.dot(high, values, total))


@triton.jit(do_not_specialize=SIZES)
def roi_align_forward(
    f0, f1, f2, f3, f4, h0, h1, h2, h3, h4, w0, w1, w2, w3, w4, s0, s1, s2, s3, s4, levels,
    boxes, image, level, out, channels,
    BINS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RATIO: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """Compute CHANNELS channels of ROWS rows of a RoI's bins; f0-f4: maps, s0-s4: 1 / stride."""
    roi = tl.program_id(0).to(tl.int64)
    row = tl.program_id(1) * ROWS
    channel = tl.program_id(2) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((ROWS * COLUMNS, CHANNELS), tl.float32)
    at = tl.load(level + roi)
    scale = choose(at, s0, s1, s2, s3, s4)
    x0, y0, x1, y1 = extent(boxes, roi, True, scale)
    if (at >= 0) & (at < levels) & is_finite(x0, y0, x1, y1):
        height, width = choose(at, h0, h1, h2, h3, h4), choose(at, w0, w1, w2, w3, w4)
        pixels = choose(at, f0, f1, f2, f3, f4)
        pixels += tl.load(image + roi).to(tl.int64) * height * width * channels
        bin_height, bin_width = tl.math.div_rn(y1 - y0, BINS), tl.math.div_rn(x1 - x0, BINS)
        top, bottom = rows_touched(row, y0, bin_height, height, BINS, ROWS)
        left, right = touched(x0, x1, width)
        cell = tl.arange(0, SIDE * SIDE)
        rows = (row + tl.arange(0, ROWS))[:, None, None, None]
        columns = tl.arange(0, COLUMNS)[None, :, None, None]
        side = tl.arange(0, SIDE)
        for y in range(top, bottom + 1, SIDE):
            vertical = weights((y + side)[None, None, :, None], rows, y0, bin_height, height, RATIO)
            for x in range(left, right + 1, SIDE):
                cell_y, cell_x = y + cell // SIDE, x + cell % SIDE
                # load before computing the weights, to hide the latency
                at_cells = places(pixels, cell_y * width + cell_x, channel, channels)
                mask = ((cell_y <= bottom) & (cell_x <= right))[:, None]
                values = tl.load(at_cells, mask=mask & (channel < channels)[None, :], other=0.0)
                cells = (x + side)[None, None, None, :]
                across = weights(cells, columns, x0, bin_width, width, RATIO)
                matrix = tl.reshape(vertical * across, (ROWS * COLUMNS, SIDE * SIDE))
                total = add_product(total, matrix, values)
    place = tl.arange(0, ROWS * COLUMNS)
    bin_y, bin_x = row + place // COLUMNS, place % COLUMNS
    at_bins = places(out, (roi * BINS + bin_y) * BINS + bin_x, channel, channels)
    mask = ((bin_y < BINS) & (bin_x < BINS))[:, None] & (channel < channels)[None, :]
    tl.store(at_bins, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=SIZES)
def roi_align_backward(
    f0, f1, f2, f3, f4, h0, h1, h2, h3, h4, w0, w1, w2, w3, w4, s0, s1, s2, s3, s4, levels,
    boxes, order, first, gradient, images, channels,
    BINS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RATIO: tl.constexpr,
    CHANNELS: tl.constexpr, ROIS: tl.constexpr,
):  # fmt: skip
    """Compute CHANNELS channels of a tile of a map's gradient.

    order (R,): RoIs sorted by image and level; first (B L + 1,): start of each group in `order`.
    """
    # tile, image and level of this program
    tile = tl.program_id(0)
    at = 0
    height, width = h0, w0
    tiles = images * tl.cdiv(h0, SIDE) * tl.cdiv(w0, SIDE)
    while tile >= tiles:
        tile -= tiles
        at += 1
        height, width = choose(at, h0, h1, h2, h3, h4), choose(at, w0, w1, w2, w3, w4)
        tiles = images * tl.cdiv(height, SIDE) * tl.cdiv(width, SIDE)
    across = tl.cdiv(width, SIDE)
    of = tile // (across * tl.cdiv(height, SIDE))
    y = tile // across % tl.cdiv(height, SIDE) * SIDE
    x = tile % across * SIDE
    scale = choose(at, s0, s1, s2, s3, s4)

    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros((SIDE * SIDE, CHANNELS), tl.float32)
    side = tl.arange(0, SIDE)
    columns = tl.arange(0, COLUMNS)
    place = tl.arange(0, ROWS * COLUMNS)
    start, end = tl.load(first + of * levels + at), tl.load(first + of * levels + at + 1)
    for block in range(start, end, ROIS):
        index = block + tl.arange(0, ROIS)
        exists = index < end
        roi = tl.load(order + index, mask=exists, other=0)
        ax0, ay0, ax1, ay1 = extent(boxes, roi, exists, scale)
        left, right = touched(ax0, ax1, width)
        top, bottom = touched(ay0, ay1, height)
        here = exists & is_finite(ax0, ay0, ax1, ay1)
        here &= (left < x + SIDE) & (right >= x) & (top < y + SIDE) & (bottom >= y)
        # indices in `order` of the RoIs that touch the tile; `end` for other RoIs
        waiting = tl.where(here, index, end)
        following = tl.min(waiting, axis=0)
        while following < end:
            current = tl.load(order + following)
            x0, y0, x1, y1 = extent(boxes, current, True, scale)
            bin_height, bin_width = tl.math.div_rn(y1 - y0, BINS), tl.math.div_rn(x1 - x0, BINS)
            cells, bins = (x + side)[None, :, None, None], columns[None, None, None, :]
            horizontal = weights(cells, bins, x0, bin_width, width, RATIO)
            for row in range(0, BINS, ROWS):
                low, high = rows_touched(row, y0, bin_height, height, BINS, ROWS)
                if (low < y + SIDE) & (high >= y):
                    bin_y, bin_x = row + place // COLUMNS, place % COLUMNS
                    bin = (current * BINS + bin_y) * BINS + bin_x
                    mask = ((bin_y < BINS) & (bin_x < BINS))[:, None]
                    mask = mask & (channel < channels)[None, :]
                    at_bins = places(gradient, bin, channel, channels)
                    values = tl.load(at_bins, mask=mask, other=0.0)
                    down_cells = (y + side)[:, None, None, None]
                    rows = (row + tl.arange(0, ROWS))[None, None, :, None]
                    vertical = weights(down_cells, rows, y0, bin_height, height, RATIO)
                    matrix = tl.reshape(vertical * horizontal, (SIDE * SIDE, ROWS * COLUMNS))
                    total = add_product(total, matrix, values)
            waiting = tl.where(waiting == following, end, waiting)
            following = tl.min(waiting, axis=0)

    cell = tl.arange(0, SIDE * SIDE)
    cell_y, cell_x = y + cell // SIDE, x + cell % SIDE
    pixels = choose(at, f0, f1, f2, f3, f4) + of.to(tl.int64) * height * width * channels
    mask = ((cell_y < height) & (cell_x < width))[:, None] & (channel < channels)[None, :]
    at_cells = places(pixels, cell_y * width + cell_x, channel, channels)
    tl.store(at_cells, total.to(f0.dtype.element_ty), mask=mask)
