"""Products of queries with relative positions, q . R, for attention on a grid and in windows, and their gradients.

A line is a row (axis 0) or a column (axis 1) of an area: of the grid, or of a window. All queries of line i meet the
same rows i - key + K - 1 of a table (2 K - 1, d), so that a line is one matrix product with a part of the table that
is read where it lies. Plain torch copies the queries for that product and expands the table to (K, K, d).
Letters: B images, h heads, d channels of a head, N tokens of the grid.
"""
# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

LOG2E = tl.constexpr(
    1.4426950408889634
)  # exponentials are powers of 2 in the kernels, as in the hardware
SMALLEST = 16  # side of a tile that tensor cores multiply
PARTS = {
    True: 96,
    False: 16,
}  # programs that share a line's images and heads, in windows and on the grid


class Layout(NamedTuple):
    """Sizes of one call. `window` tokens per side, 0 for attention over the whole grid."""

    batch: int
    height: int
    width: int
    heads: int
    depth: int
    window: int

    @property
    def tokens(self) -> int:
        """Of the grid."""
        return self.height * self.width

    @property
    def rows(self) -> int:
        """Rows of an area within which tokens attend to each other: a window or the grid."""
        return self.window or self.height

    @property
    def columns(self) -> int:
        return self.window or self.width

    @property
    def across(self) -> int:
        """Windows side by side."""
        return -(-self.width // self.columns)

    @property
    def areas(self) -> int:
        """Windows of an image; the last row and column of them may go beyond the grid."""
        return -(-self.height // self.rows) * self.across

    @property
    def groups(self) -> int:
        """Areas of all images, times heads: each is an attention of its own."""
        return self.batch * self.areas * self.heads

    @property
    def scale(self) -> float:
        return self.depth**-0.5

    @property
    def tile(self) -> int:
        """Columns of the tiles that hold a head's channels."""
        return tile(self.depth)


class Place(NamedTuple):
    """Where the products of an axis lie in memory: steps between groups, queries and keys, and the first one's place."""

    group: int
    query: int
    key: int
    first: int


class Products(NamedTuple):
    """q . R for every query, and every key row and key column of its area; times log2(e).

    On the grid `rows` (groups, H, N) and `columns` (groups, N, tile of W); in windows both lie in one tensor
    (groups, tokens of a window, 2 tiles of its side), rows first.
    """

    rows: Tensor
    columns: Tensor

    @classmethod
    def empty(cls, layout: Layout, like: Tensor) -> Products:
        if layout.window:
            both = like.new_empty(layout.groups, layout.window**2, 2 * tile(layout.window))
            return cls(both, both)
        rows = like.new_empty(layout.groups, layout.height, layout.tokens)
        return cls(rows, like.new_empty(layout.groups, layout.tokens, tile(layout.width)))


def tile(size: int) -> int:
    """The side of a tile that holds `size` things."""
    return max(SMALLEST, triton.next_power_of_2(size))


def place(layout: Layout, axis: int) -> Place:
    """Of the products of an axis, as in `Products`."""
    if layout.window:
        side = tile(layout.window)
        return Place(layout.window**2 * 2 * side, 2 * side, 1, axis * side)
    if axis == 0:
        return Place(layout.height * layout.tokens, 1, layout.tokens, 0)
    return Place(layout.tokens * tile(layout.width), tile(layout.width), 1, 0)


def products(layout: Layout, qkv: Tensor, tables: tuple[Tensor, Tensor], factor: float) -> Products:
    """q . R times `factor` and log2(e), from qkv (B, N, 3 h d) and the two tables (2 K - 1, d)."""
    found = Products.empty(layout, qkv)
    for axis, (table, out) in enumerate(zip(tables, found, strict=True)):
        forward_kernel[(_lines(layout, axis), layout.groups)](
            qkv,
            table,
            out,
            layout.areas,
            layout.across,
            layout.height,
            layout.width,
            factor * LOG2E.value,
            *place(layout, axis),
            **_room(layout, axis),
            **_sizes(layout, axis),
        )
    return found


def gradients(
    layout: Layout,
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    factor: float,
    logits: Products,
    dqkv: Tensor,
) -> tuple[Tensor, Tensor]:
    """Adds to the queries' part of dqkv, and returns the gradients of the tables (float32).

    `logits`: the gradient of the logits, summed for each query over the keys of a row and of a column.
    """
    found = []
    parts = min(layout.groups, PARTS[layout.window > 0])
    for axis, (table, given) in enumerate(zip(tables, logits, strict=True)):
        lines = _lines(layout, axis)
        sums = qkv.new_empty(parts, lines, lines, layout.depth, dtype=torch.float32)
        backward_kernel[(lines, parts)](
            qkv,
            table,
            given,
            dqkv,
            sums,
            layout.groups,
            triton.cdiv(layout.groups, parts),
            layout.areas,
            layout.across,
            layout.height,
            layout.width,
            factor,
            *place(layout, axis),
            num_stages=1,
            **_sizes(layout, axis),
        )
        found.append(diagonal_sums(sums.sum(dim=0)))
    return found[0], found[1]


def diagonal_sums(x: Tensor) -> Tensor:
    """(K, K, d) -> (2 K - 1, d): row r holds the sum over all i - j + K - 1 = r."""
    size, _, depth = x.shape
    # Every line is moved one place further than the one above it, by giving all of them one place too many.
    skewed = F.pad(x.flip(1), (0, 0, 0, size)).view(-1, depth)[: size * (2 * size - 1)]
    return skewed.view(size, 2 * size - 1, depth).sum(dim=0)


def _lines(layout: Layout, axis: int) -> int:
    return layout.columns if axis else layout.rows


def _room(layout: Layout, axis: int) -> dict[str, float]:
    """For how many keys there is room in memory, and what the ones beyond the last are filled with.

    Tiles of the grid's columns end with -inf, so that the kernels there need no other mask of their keys.
    """
    if layout.window:
        return {"ROOM": tile(layout.window), "FILL": 0.0}
    return {"ROOM": tile(layout.width) if axis else layout.height, "FILL": float("-inf")}


def _sizes(layout: Layout, axis: int) -> dict[str, int]:
    """Constants of the kernels of this file."""
    sides = (layout.rows, layout.columns)
    return {
        "HEADS": layout.heads,
        "DEPTH": layout.depth,
        "CHANNELS": layout.tile,
        "ROWS": layout.rows,
        "COLUMNS": layout.columns,
        "AXIS": axis,
        "QUERIES": tile(sides[1 - axis]),
        "KEYS": tile(sides[axis]),
        "num_warps": 1 if layout.window else 4,
    }


@triton.jit
def corner(area, areas, across, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Image, first row and first column of an area."""
    inside = area % areas
    return area // areas, (inside // across) * ROWS, (inside % across) * COLUMNS


@triton.jit
def line(i, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr, QUERIES: tl.constexpr):
    """Rows and columns of the queries of line i within its area, and which of them exist."""
    j = tl.arange(0, QUERIES)
    if AXIS == 0:
        return i + j * 0, j, j < COLUMNS
    else:
        return j, i + j * 0, j < ROWS


@triton.jit
def table_rows(
    table,
    i,
    dtype: tl.constexpr,
    SIDE: tl.constexpr,
    KEYS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """The relative positions of all keys as line i sees them: (KEYS, CHANNELS)."""
    key = tl.arange(0, KEYS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    at = table + (i - key + SIDE - 1) * DEPTH + channel
    return tl.load(at, mask=(key < SIDE) & (channel < DEPTH), other=0.0).to(dtype)


@triton.jit
def forward_kernel(
    qkv,
    table,
    out,
    areas,
    across,
    height,
    width,
    factor,
    group_step,
    query_step,
    key_step,
    first,
    ROOM: tl.constexpr,
    FILL: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One line of one group."""
    i = tl.program_id(0)
    group = tl.program_id(1)
    SIDE: tl.constexpr = COLUMNS if AXIS else ROWS
    image, top, left = corner(group // HEADS, areas, across, ROWS, COLUMNS)
    row, column, exists = line(i, ROWS, COLUMNS, AXIS, QUERIES)
    inside = exists & (top + row < height) & (left + column < width)
    token = image.to(tl.int64) * height * width + (top + row) * width + left + column
    channel = tl.arange(0, CHANNELS)[None, :]
    q = tl.load(
        qkv + token[:, None] * (3 * HEADS * DEPTH) + group % HEADS * DEPTH + channel,
        mask=inside[:, None] & (channel < DEPTH),
        other=0.0,
    )
    positions = table_rows(table, i, q.dtype, SIDE, KEYS, DEPTH, CHANNELS)
    found = tl.dot(q, tl.trans(positions), input_precision="ieee") * factor
    key = tl.arange(0, KEYS)[None, :]
    if ROOM != SIDE:
        found = tl.where(key < SIDE, found, FILL)
    at = group.to(tl.int64) * group_step + first + (row * COLUMNS + column)[:, None] * query_step
    written = exists[:, None] & (key < ROOM)
    tl.store(out + at + key * key_step, found.to(out.dtype.element_ty), mask=written)


@triton.jit
def backward_kernel(
    qkv,
    table,
    logits,
    dqkv,
    sums,
    groups,
    share,
    areas,
    across,
    height,
    width,
    factor,
    group_step,
    query_step,
    key_step,
    first,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """One line of `share` groups, one after the other, so that the sums of a line's positions need no atomics."""
    i = tl.program_id(0)
    part = tl.program_id(1)
    SIDE: tl.constexpr = COLUMNS if AXIS else ROWS
    row, column, exists = line(i, ROWS, COLUMNS, AXIS, QUERIES)
    channel = tl.arange(0, CHANNELS)[None, :]
    key = tl.arange(0, KEYS)
    positions = table_rows(table, i, dqkv.dtype.element_ty, SIDE, KEYS, DEPTH, CHANNELS)
    total = tl.zeros((KEYS, CHANNELS), tl.float32)
    for group in range(part * share, tl.minimum(part * share + share, groups)):
        image, top, left = corner(group // HEADS, areas, across, ROWS, COLUMNS)
        inside = exists & (top + row < height) & (left + column < width)
        token = tl.cast(image, tl.int64) * height * width + (top + row) * width + left + column
        at = token[:, None] * (3 * HEADS * DEPTH) + group % HEADS * DEPTH + channel
        real = inside[:, None] & (channel < DEPTH)
        q = tl.load(qkv + at, mask=real, other=0.0)
        query = (
            tl.cast(group, tl.int64) * group_step + first + (row * COLUMNS + column) * query_step
        )
        given = tl.load(
            logits + query[:, None] + key[None, :] * key_step,
            mask=inside[:, None] & (key < SIDE)[None, :],
            other=0.0,
        )
        total = tl.dot(tl.trans(given), q, total, input_precision="ieee")
        before = tl.load(dqkv + at, mask=real, other=0.0).to(tl.float32)
        more = tl.dot(given, positions, input_precision="ieee") * factor
        tl.store(dqkv + at, (before + more).to(dqkv.dtype.element_ty), mask=real)
    at = ((part * SIDE + i) * SIDE + key[:, None]) * DEPTH + channel
    tl.store(sums + at, total * factor, mask=(key[:, None] < SIDE) & (channel < DEPTH))
