"""Products of queries with relative positions, q . R, and helpers of the attention kernels.

A line is a row (axis 0) or a column (axis 1) of an area. All queries of a line use the same rows
of a table (2 K - 1, d), so that each line needs one matrix product with a slice of the table. Plain
torch would copy the queries and expand the table to (K, K, d).

Notation: B images, d channels per head, K tokens along an axis of an area, L the `Layout`, which
is a compile-time constant of the kernels.
"""
# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

LOG2E = tl.constexpr(1.4426950408889634)  # log2(e): exponentials are computed as powers of 2
# Maximum number of programs that share a line's groups, for the whole grid (True) and windows
PARTS = {True: 16, False: 96}


class Layout(NamedTuple):
    """Sizes of a call; an area is a window, or the whole grid."""

    height: int
    width: int
    heads: int
    depth: int
    rows: int
    columns: int
    whole: bool  # whether the area is the whole grid
    # tile sizes of channels, rows and columns
    channels: int
    row_tile: int
    column_tile: int
    # queries and rows of keys per block
    queries: int = 0
    lines: int = 0

    @classmethod
    def of(cls, height: int, width: int, heads: int, depth: int, window: int) -> Layout:
        """Create the layout for windows of `window` tokens per side (0: for the whole grid)."""
        rows, columns = window or height, window or width
        tiles = (tile(size) for size in (depth, rows, columns))
        return cls(height, width, heads, depth, rows, columns, not window, *tiles)

    @property
    def sides(self) -> tuple[int, int]:
        """Numbers of rows and columns of an area."""
        return self.rows, self.columns

    @property
    def area(self) -> int:
        """Number of tokens in an area."""
        return self.rows * self.columns

    @property
    def groups(self) -> int:
        """Number of independent attention computations per image: areas times heads."""
        down, across = triton.cdiv(self.height, self.rows), triton.cdiv(self.width, self.columns)
        return down * across * self.heads

    @property
    def padded(self) -> bool:
        """Whether some areas extend beyond the grid."""
        return self.height % self.rows + self.width % self.columns > 0

    def products(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Allocate q . R for rows (B groups, K, area) and columns (B groups, area, tile of K)."""
        groups = len(qkv) * self.groups
        by_row = qkv.new_empty(groups, self.rows, self.area)
        return by_row, qkv.new_empty(groups, self.area, self.column_tile)


def tile(size: int) -> int:
    """Return the smallest tile size that tensor cores support and that fits `size` elements."""
    return max(16, triton.next_power_of_2(size))


def positions(
    layout: Layout, qkv: Tensor, tables: tuple[Tensor, Tensor], factor: float
) -> tuple[Tensor, Tensor]:
    """Return q . R, multiplied by `factor` and log2(e); -inf beyond the last column."""
    found = layout.products(qkv)
    for axis, (table, product) in enumerate(zip(tables, found, strict=True)):
        grid = (layout.sides[axis] * len(product),)
        given = qkv, table, product, factor * LOG2E.value, layout
        positions_kernel[grid](*given, AXIS=axis, num_warps=4 if layout.whole else 1)
    return found


def positions_backward(
    layout: Layout,
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    factor: float,
    dproducts: tuple[Tensor, Tensor],
    dqkv: Tensor,
) -> list[Tensor]:
    """Add the gradient of the queries to dqkv, and return the gradients of the tables."""
    found = []
    for axis, (table, dproduct) in enumerate(zip(tables, dproducts, strict=True)):
        side, groups = layout.sides[axis], len(dproduct)
        parts = min(groups, PARTS[layout.whole])
        sums = qkv.new_empty(parts, side, side, layout.depth, dtype=torch.float32)
        given = qkv, table, dproduct, dqkv, sums, factor, groups, layout
        options = {"num_warps": 4 if layout.whole else 1, "num_stages": 1}
        positions_backward_kernel[(side, parts)](*given, AXIS=axis, **options)
        found.append(diagonal_sums(sums.sum(dim=0)))
    return found


def diagonal_sums(x: Tensor) -> Tensor:
    """Sum (K, K, d) to (2 K - 1, d): row r is the sum over all (i, j) with i - j + K - 1 = r."""
    size, _, depth = x.shape
    # Rows of length 2 K are read as rows of length 2 K - 1, so that row i is shifted by i.
    skewed = F.pad(x.flip(1), (0, 0, 0, size)).view(-1, depth)[: size * (2 * size - 1)]
    return skewed.view(size, 2 * size - 1, depth).sum(dim=0)


@triton.jit
def origin(group, L):
    """Return the first token of a group's image, the area's first row and column, and the head."""
    across = (L.width + L.columns - 1) // L.columns
    areas = (L.height + L.rows - 1) // L.rows * across
    area = group // L.heads
    first = tl.cast(area // areas, tl.int64) * (L.height * L.width)
    return first, area % areas // across * L.rows, area % across * L.columns, group % L.heads


@triton.jit
def tokens(row, column, top, left, L):
    """Return tokens' grid indices, whether they are in the area, and whether also in the grid."""
    exists = (row < L.rows) & (column < L.columns)
    inside = exists & (top + row < L.height) & (left + column < L.width)
    return (top + row) * L.width + left + column, exists, inside


@triton.jit
def load(x, token, inside, step, L):
    """Load a head's channels (tokens, channels) of tokens that are `step` elements apart."""
    channel = tl.arange(0, L.channels)[None, :]
    mask = inside[:, None] & (channel < L.depth)
    return tl.load(x + token[:, None] * step + channel, mask=mask, other=0.0)


@triton.jit
def store(to, token, inside, x, step, L):
    """Store a head's channels: the inverse of `load`."""
    channel = tl.arange(0, L.channels)[None, :]
    mask = inside[:, None] & (channel < L.depth)
    tl.store(to + token[:, None] * step + channel, x.to(to.dtype.element_ty), mask=mask)


@triton.jit
def line_of(i, top, left, L, AXIS, QUERIES: tl.constexpr):
    """For the queries of line i, return their indices in the area and the result of `tokens`."""
    j = tl.arange(0, QUERIES)
    row = i + j * 0 if AXIS == 0 else j
    column = j if AXIS == 0 else i + j * 0
    token, exists, inside = tokens(row, column, top, left, L)
    return row * L.columns + column, token, exists, inside


@triton.jit
def table_rows(table, i, side, L, KEYS: tl.constexpr):
    """Load the relative positions of all keys for line i: (KEYS, channels)."""
    key = tl.arange(0, KEYS)[:, None]
    channel = tl.arange(0, L.channels)[None, :]
    mask = (key < side) & (channel < L.depth)
    at = table + (i - key + side - 1) * L.depth + channel
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def place_of(group, i, key, L, AXIS, KEYS):
    """Return the offset of q . R for query i and a key in a tensor of `Layout.products`."""
    group, area = tl.cast(group, tl.int64), L.rows * L.columns
    return (group * L.rows + key) * area + i if AXIS == 0 else (group * area + i) * KEYS + key


@triton.jit
def positions_kernel(qkv, table, product, factor, L: tl.constexpr, AXIS: tl.constexpr):
    """Multiply all queries of line i by the rows i - key + K - 1 of a table."""
    SIDE: tl.constexpr = L.columns if AXIS else L.rows
    QUERIES: tl.constexpr = L.row_tile if AXIS else L.column_tile
    KEYS: tl.constexpr = L.column_tile if AXIS else L.row_tile
    STEP: tl.constexpr = 3 * L.heads * L.depth
    i, group = tl.program_id(0) % SIDE, tl.program_id(0) // SIDE
    first, top, left, head = origin(group, L)
    place, token, exists, inside = line_of(i, top, left, L, AXIS, QUERIES)
    q = load(qkv + (first * STEP + head * L.depth), token, inside, STEP, L)
    known = table_rows(table, i, SIDE, L, KEYS).to(q.dtype)
    key = tl.arange(0, KEYS)[None, :]
    found = tl.dot(q, tl.trans(known), input_precision="ieee") * factor
    found = tl.where(key < SIDE, found, float("-inf")).to(product.dtype.element_ty)
    at = product + place_of(group, place[:, None], key, L, AXIS, KEYS)
    tl.store(at, found, mask=exists[:, None] & ((key < SIDE) | (AXIS == 1)))


@triton.jit
def positions_backward_kernel(
    qkv, table, dproduct, dqkv, sums, factor, groups, L: tl.constexpr, AXIS: tl.constexpr
):
    """Process line i of several groups in sequence, so that sums over groups need no atomics."""
    i, part = tl.program_id(0), tl.program_id(1)
    SIDE: tl.constexpr = L.columns if AXIS else L.rows
    QUERIES: tl.constexpr = L.row_tile if AXIS else L.column_tile
    KEYS: tl.constexpr = L.column_tile if AXIS else L.row_tile
    STEP: tl.constexpr = 3 * L.heads * L.depth
    CHANNELS: tl.constexpr = L.channels
    key = tl.arange(0, KEYS)
    known = table_rows(table, i, SIDE, L, KEYS).to(dqkv.dtype.element_ty)
    total = tl.zeros((KEYS, CHANNELS), tl.float32)
    share = tl.cdiv(groups, tl.num_programs(1))
    for group in range(part * share, tl.minimum(part * share + share, groups)):
        first, top, left, head = origin(group, L)
        place, token, exists, inside = line_of(i, top, left, L, AXIS, QUERIES)
        shift = first * STEP + head * L.depth
        q = load(qkv + shift, token, inside, STEP, L)
        at = place_of(group, place[:, None], key[None, :], L, AXIS, KEYS)
        mask = inside[:, None] & (key < SIDE)[None, :]
        given = tl.load(dproduct + at, mask=mask, other=0.0)
        total = tl.dot(tl.trans(given), q, total, input_precision="ieee")
        dq = load(dqkv + shift, token, inside, STEP, L).to(tl.float32)
        dq += tl.dot(given, known, input_precision="ieee") * factor
        store(dqkv + shift, token, inside, dq, STEP, L)
    channel = tl.arange(0, L.channels)[None, :]
    at = sums + ((part * SIDE + i) * SIDE + key[:, None]) * L.depth + channel
    tl.store(at, total * factor, mask=(key[:, None] < SIDE) & (channel < L.depth))
