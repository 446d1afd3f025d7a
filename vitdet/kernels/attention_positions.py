"""Products of queries with relative positions, q . R, their gradients, and helpers of the attention
kernels.

All queries of a line, a row (axis 0) or a column (axis 1) of an area, use the same rows of a table
(2 K - 1, d), so that a line is one matrix product with a slice of the table. Plain torch copies the
queries and expands the table to (K, K, d).

Letters: B images, h heads, d channels of a head, K tokens along an axis of an area.
"""
# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are computed as powers of 2
SMALLEST = 16  # side of a tile that tensor cores multiply
PARTS = {
    True: 16,
    False: 96,
}  # programs that share the images and heads of a line, on the grid and in windows


class Layout(NamedTuple):
    """Sizes of one call. `window`: tokens per side, 0 for the whole grid."""

    height: int
    width: int
    heads: int
    depth: int
    window: int

    @property
    def sides(self) -> tuple[int, int]:
        """Rows and columns of an area."""
        return self.window or self.height, self.window or self.width

    @property
    def area(self) -> int:
        """Tokens of an area."""
        return self.sides[0] * self.sides[1]

    @property
    def groups(self) -> int:
        """Attentions per image: areas times heads."""
        rows, columns = self.sides
        return triton.cdiv(self.height, rows) * triton.cdiv(self.width, columns) * self.heads

    @property
    def padded(self) -> bool:
        """Whether areas exceed the grid."""
        rows, columns = self.sides
        return self.height % rows + self.width % columns > 0

    @property
    def constants(self) -> dict[str, int]:
        rows, columns = self.sides
        return {
            "HEIGHT": self.height,
            "WIDTH": self.width,
            "HEADS": self.heads,
            "DEPTH": self.depth,
            "CHANNELS": tile(self.depth),
            "ROWS": rows,
            "COLUMNS": columns,
        }


def tile(size: int) -> int:
    """Return the side of a tile that contains `size` elements."""
    return max(SMALLEST, triton.next_power_of_2(size))


def empty_products(layout: Layout, qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Allocate q . R for the rows (B groups, K, tokens of an area) and the columns (B groups,
    tokens, tile of K).
    """
    groups = len(qkv) * layout.groups
    rows, columns = layout.sides
    by_row = qkv.new_empty(groups, rows, layout.area)
    return by_row, qkv.new_empty(groups, layout.area, tile(columns))


def positions(
    layout: Layout, qkv: Tensor, tables: tuple[Tensor, Tensor], factor: float
) -> tuple[Tensor, Tensor]:
    """Return q . R times `factor` and log2(e), shaped as `empty_products`; -inf beyond the last
    column.
    """
    found = empty_products(layout, qkv)
    for axis, (table, product) in enumerate(zip(tables, found, strict=True)):
        positions_kernel[(layout.sides[axis] * len(product),)](
            qkv, table, product, factor * LOG2E.value, **_lines(layout, axis)
        )
    return found


def positions_backward(
    layout: Layout,
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    factor: float,
    dproducts: tuple[Tensor, Tensor],
    dqkv: Tensor,
) -> tuple[Tensor, Tensor]:
    """Add to the queries' part of dqkv, and return the gradients of the tables."""
    found = []
    for axis, (table, dproduct) in enumerate(zip(tables, dproducts, strict=True)):
        side, groups = layout.sides[axis], len(dproduct)
        parts = min(groups, PARTS[layout.window == 0])
        sums = qkv.new_empty(parts, side, side, layout.depth, dtype=torch.float32)
        positions_backward_kernel[(side, parts)](
            qkv, table, dproduct, dqkv, sums, factor, groups, **_lines(layout, axis), num_stages=1
        )
        found.append(diagonal_sums(sums.sum(dim=0)))
    return found[0], found[1]


def diagonal_sums(x: Tensor) -> Tensor:
    """(K, K, d) -> (2 K - 1, d): row r is the sum over all i - j + K - 1 = r."""
    size, _, depth = x.shape
    # shift every line by one more than the line above, by padding all of them by one
    skewed = F.pad(x.flip(1), (0, 0, 0, size)).view(-1, depth)[: size * (2 * size - 1)]
    return skewed.view(size, 2 * size - 1, depth).sum(dim=0)


def _lines(layout: Layout, axis: int) -> dict[str, int]:
    """Return the constants of the kernels for lines: rows (axis 0) or columns (axis 1)."""
    sides = layout.sides
    tiles = {"AXIS": axis, "QUERIES": tile(sides[1 - axis]), "KEYS": tile(sides[axis])}
    return layout.constants | tiles | {"num_warps": 1 if layout.window else 4}


@triton.jit
def origin(group, HEIGHT, WIDTH, HEADS, ROWS, COLUMNS):
    """Return a group's first token of its image, first row and column of its area, and head."""
    across = (WIDTH + COLUMNS - 1) // COLUMNS
    areas = (HEIGHT + ROWS - 1) // ROWS * across
    area = group // HEADS
    first = tl.cast(area // areas, tl.int64) * (HEIGHT * WIDTH)
    return first, area % areas // across * ROWS, area % across * COLUMNS, group % HEADS


@triton.jit
def tokens(row, column, top, left, HEIGHT, WIDTH, ROWS, COLUMNS):
    """Return the grid tokens at these rows and columns of an area, which of them exist, and which
    are in the grid.
    """
    exists = (row < ROWS) & (column < COLUMNS)
    inside = exists & (top + row < HEIGHT) & (left + column < WIDTH)
    return (top + row) * WIDTH + left + column, exists, inside


@triton.jit
def load(x, token, inside, step, DEPTH, CHANNELS: tl.constexpr):
    """Load a head's channels of these tokens, `step` apart: (tokens, CHANNELS)."""
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = inside[:, None] & (channel < DEPTH)
    return tl.load(x + token[:, None] * step + channel, mask=mask, other=0.0)


@triton.jit
def store(to, token, inside, x, step, DEPTH, CHANNELS: tl.constexpr):
    """Inverse of `load`."""
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = inside[:, None] & (channel < DEPTH)
    tl.store(to + token[:, None] * step + channel, x.to(to.dtype.element_ty), mask=mask)


@triton.jit
def line_of(i, top, left, HEIGHT, WIDTH, ROWS, COLUMNS, AXIS, QUERIES: tl.constexpr):
    """Return the queries of row i (axis 0) or column i (axis 1): their indices in the area, and as
    `tokens`.
    """
    j = tl.arange(0, QUERIES)
    row = i + j * 0 if AXIS == 0 else j
    column = j if AXIS == 0 else i + j * 0
    token, exists, inside = tokens(row, column, top, left, HEIGHT, WIDTH, ROWS, COLUMNS)
    return row * COLUMNS + column, token, exists, inside


@triton.jit
def table_rows(table, i, side, DEPTH, CHANNELS: tl.constexpr, KEYS: tl.constexpr):
    """Load the relative positions of all keys for line i: (KEYS, CHANNELS)."""
    key = tl.arange(0, KEYS)[:, None]
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = (key < side) & (channel < DEPTH)
    at = table + (i - key + side - 1) * DEPTH + channel
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def place_of(group, i, key, AXIS, AREA, ROWS, KEYS):
    """Return the address of q . R of query i and a key in the result of `empty_products`."""
    group = tl.cast(group, tl.int64)
    return (group * ROWS + key) * AREA + i if AXIS == 0 else (group * AREA + i) * KEYS + key


@triton.jit
def positions_kernel(
    qkv,
    table,
    product,
    factor,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Multiply all queries of line i by the rows i - key + K - 1 of a table."""
    SIDE: tl.constexpr = COLUMNS if AXIS else ROWS
    i = tl.program_id(0) % SIDE
    group = tl.program_id(0) // SIDE
    first, top, left, head = origin(group, HEIGHT, WIDTH, HEADS, ROWS, COLUMNS)
    place, token, exists, inside = line_of(
        i, top, left, HEIGHT, WIDTH, ROWS, COLUMNS, AXIS, QUERIES
    )
    qkv += first * (3 * HEADS * DEPTH) + head * DEPTH
    q = load(qkv, token, inside, 3 * HEADS * DEPTH, DEPTH, CHANNELS)
    known = table_rows(table, i, SIDE, DEPTH, CHANNELS, KEYS).to(q.dtype)
    key = tl.arange(0, KEYS)[None, :]
    found = tl.dot(q, tl.trans(known), input_precision="ieee") * factor
    found = tl.where(key < SIDE, found, float("-inf")).to(product.dtype.element_ty)
    at = product + place_of(group, place[:, None], key, AXIS, ROWS * COLUMNS, ROWS, KEYS)
    tl.store(at, found, mask=exists[:, None] & ((key < SIDE) | (AXIS == 1)))


@triton.jit
def positions_backward_kernel(
    qkv,
    table,
    dproduct,
    dqkv,
    sums,
    factor,
    groups,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    AXIS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Line i of several groups in sequence, so that the sums over them need no atomics."""
    i = tl.program_id(0)
    part = tl.program_id(1)
    SIDE: tl.constexpr = COLUMNS if AXIS else ROWS
    STEP: tl.constexpr = 3 * HEADS * DEPTH
    key = tl.arange(0, KEYS)
    known = table_rows(table, i, SIDE, DEPTH, CHANNELS, KEYS).to(dqkv.dtype.element_ty)
    total = tl.zeros((KEYS, CHANNELS), tl.float32)
    share = tl.cdiv(groups, tl.num_programs(1))
    for group in range(part * share, tl.minimum(part * share + share, groups)):
        first, top, left, head = origin(group, HEIGHT, WIDTH, HEADS, ROWS, COLUMNS)
        place, token, exists, inside = line_of(
            i, top, left, HEIGHT, WIDTH, ROWS, COLUMNS, AXIS, QUERIES
        )
        shift = first * STEP + head * DEPTH
        q = load(qkv + shift, token, inside, STEP, DEPTH, CHANNELS)
        at = place_of(group, place[:, None], key[None, :], AXIS, ROWS * COLUMNS, ROWS, KEYS)
        mask = inside[:, None] & (key < SIDE)[None, :]
        given = tl.load(dproduct + at, mask=mask, other=0.0)
        total = tl.dot(tl.trans(given), q, total, input_precision="ieee")
        dq = load(dqkv + shift, token, inside, STEP, DEPTH, CHANNELS).to(tl.float32)
        dq += tl.dot(given, known, input_precision="ieee") * factor
        store(dqkv + shift, token, inside, dq, STEP, DEPTH, CHANNELS)
    channel = tl.arange(0, CHANNELS)[None, :]
    at = sums + ((part * SIDE + i) * SIDE + key[:, None]) * DEPTH + channel
    tl.store(at, total * factor, mask=(key[:, None] < SIDE) & (channel < DEPTH))
