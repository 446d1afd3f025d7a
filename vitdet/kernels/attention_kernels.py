"""The Triton kernels of `vitdet.kernels.attention`, and their launches.

Tokens attend to each other within an area: a window, or the whole grid. A block of keys consists of
rows of the area, each padded to a power of 2. The bias along the height is then one number per
query and row of keys, and the bias along the width is the same tile for every row, kept in
registers. The gradients of the two biases are sums of the logits' gradient within rows and over
rows. Thus, positions need no matrix product in these kernels, and queries and keys are not widened.
Windows are read from and written to the grid; tokens beyond the grid equal the projection's bias.

The backward pass computes the logits twice, for blocks of queries and for blocks of keys (7
matrix products instead of 5), so that it needs no atomics and is deterministic.

Notation: B images, h heads, d channels per head, N tokens of the grid, K tokens along an axis of
an area.
"""
# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from vitdet.kernels.attention_positions import (
    LOG2E,
    Layout,
    load,
    origin,
    positions,
    positions_backward,
    store,
    tokens,
)


class Blocks(NamedTuple):
    """Options of a kernel launch."""

    queries: int  # queries per block
    keys: int  # keys per block, but at least one row of keys
    warps: int  # warps per program
    stages: int  # stages of the software pipeline
    registers: int | None = None  # maximum number of registers per thread, for higher occupancy


# Options for the whole grid (True) and for windows (False). They are among the fastest for 64 x 64
# tokens, windows of 14 x 14 and d = 64 on an H200 (`tests/bench/attention.py`). A register limit
# would gain another 5 to 9%, but cause spilling with wider heads.
FORWARD = {True: Blocks(64, 64, 4, 3), False: Blocks(64, 64, 4, 2)}
BACKWARD_QUERIES = {True: Blocks(64, 64, 4, 3), False: Blocks(64, 64, 4, 2)}
BACKWARD_KEYS = {True: Blocks(64, 64, 4, 2), False: Blocks(64, 64, 4, 2)}


def forward(
    layout: Layout, qkv: Tensor, bias: Tensor, tables: tuple[Tensor, Tensor], factor: float
) -> tuple[Tensor, Tensor]:
    """Return the heads' output (B, N, h d) and log2 of the softmax denominators (B groups, area).

    The arguments are qkv (B, N, 3 h d), its bias (3 h d), and the tables of relative positions
    (2 K - 1, d), which are multiplied by `factor`.
    """
    batch, tokens, channels = qkv.shape
    out = qkv.new_empty(batch, tokens, channels // 3)
    sums = qkv.new_empty(batch * layout.groups, layout.area, dtype=torch.float32)
    products = positions(layout, qkv, tables, factor)
    layout, options = _blocks(layout, FORWARD)
    programs = triton.cdiv(layout.area, layout.queries) * len(sums)
    launch(forward_kernel, programs, (qkv, bias, *products, out, sums, layout), options)
    return out, sums


def backward(
    gradient: Tensor,
    out: Tensor,
    sums: Tensor,
    layout: Layout,
    qkv: Tensor,
    bias: Tensor,
    tables: tuple[Tensor, Tensor],
    factor: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of qkv and, in float32, of bias and both tables.

    The kernels use the bias only for tokens beyond the grid, so its gradient is summed over these.
    """
    products = positions(layout, qkv, tables, factor)  # q . R is recomputed to save memory
    dproducts = layout.products(qkv)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(sums)
    blocks, options = _blocks(layout, BACKWARD_QUERIES)
    programs = triton.cdiv(layout.area, blocks.queries) * len(sums)
    given = qkv, bias, *products, out, gradient, sums, delta, dqkv, *dproducts, blocks
    launch(backward_queries_kernel, programs, given, options)
    blocks, options = _blocks(layout, BACKWARD_KEYS)
    number = triton.cdiv(layout.rows, blocks.lines)
    # sums of the gradients of keys and values beyond the grid, per block of keys
    size = len(sums) // layout.heads, layout.heads, number if layout.padded else 0
    beyond = sums.new_zeros(*size, 2, layout.depth)
    of_keys = qkv, bias, *products, gradient, sums, delta, dqkv, beyond, blocks
    launch(backward_keys_kernel, number * len(sums), of_keys, options)
    dbias = F.pad(beyond.sum(dim=(0, 2)).transpose(0, 1), (0, 0, 0, 0, 1, 0)).reshape(-1)
    drel_h, drel_w = positions_backward(layout, qkv, tables, factor, dproducts, dqkv)
    return dqkv, dbias, drel_h, drel_w


def _blocks(layout: Layout, choice: dict[bool, Blocks]) -> tuple[Layout, dict[str, Any]]:
    """Return the layout with block sizes, and the launch options."""
    queries, keys, warps, stages, registers = choice[layout.whole]
    layout = layout._replace(queries=queries, lines=max(1, keys // layout.column_tile))
    return layout, {"num_warps": warps, "num_stages": stages, "maxnreg": registers}


def launch(kernel: Any, programs: int, given: Sequence[Any], options: dict[str, Any]) -> None:
    """Launch a kernel, with fewer stages if the GPU has too little shared memory for `options`."""
    try:
        kernel[(programs,)](*given, **options)
    except triton.runtime.errors.OutOfResources:
        if options["num_stages"] == 1:
            raise
        launch(kernel, programs, given, options | {"num_stages": options["num_stages"] - 1})


@triton.jit
def load_keys(x, bias, token, exists, inside, step, L):
    """Load keys or values like `load`, but read the bias for tokens beyond the grid."""
    channel = tl.arange(0, L.channels)[None, :]
    at = x + token[:, None] * step + channel
    if L.height % L.rows + L.width % L.columns > 0:
        at = tl.where(inside[:, None], at, bias + channel)
    return tl.load(at, mask=exists[:, None] & (channel < L.depth), other=0.0)


@triton.jit
def load_rows(rows, group, row, i, exists, L, LINES):
    """Load q . R for queries i and rows of keys (broadcast); -inf beyond the last row."""
    at = rows + (group.to(tl.int64) * L.rows + row) * (L.rows * L.columns) + i
    if L.rows % LINES == 0:
        found = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    else:
        found = tl.load(at, mask=exists & (row < L.rows), other=0.0).to(tl.float32)
        found = tl.where(row < L.rows, found, float("-inf"))
    return found


@triton.jit
def forward_kernel(qkv, bias, rows, columns, out, sums, L: tl.constexpr):
    """Compute attention for a block of queries with a running maximum.

    As in FlashAttention-2 (arXiv:2307.08691).
    """
    QUERIES: tl.constexpr = L.queries
    LINES: tl.constexpr = L.lines
    LINE: tl.constexpr = L.column_tile
    AREA: tl.constexpr = L.rows * L.columns
    BLOCKS: tl.constexpr = (AREA + QUERIES - 1) // QUERIES
    group = tl.program_id(0) // BLOCKS
    begin = tl.program_id(0) % BLOCKS * QUERIES
    first, top, left, head = origin(group, L)
    if top + begin // L.columns >= L.height:
        return
    CHANNELS: tl.constexpr = L.channels
    PART: tl.constexpr = L.heads * L.depth
    STEP: tl.constexpr = 3 * PART
    qkv += first * STEP + head * L.depth
    bias += head * L.depth
    i = begin + tl.arange(0, QUERIES)
    token, exists, inside = tokens(i // L.columns, i % L.columns, top, left, L)
    line = group.to(tl.int64) * AREA + i
    q = load(qkv, token, inside, STEP, L)
    along_width = columns + line[:, None] * LINE + tl.arange(0, LINE)[None, :]
    along_width = tl.load(along_width, mask=exists[:, None], other=0.0).to(tl.float32)[:, None, :]
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, CHANNELS), tl.float32)
    key = tl.arange(0, LINES * LINE)
    for start in range(0, L.rows, LINES):
        at, real, within = tokens(start + key // LINE, key % LINE, top, left, L)
        row = start + tl.arange(0, LINES)
        along_height = load_rows(rows, group, row[None, :], i[:, None], exists[:, None], L, LINES)
        k = load_keys(qkv + PART, bias + PART, at, real, within, STEP, L)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * (L.depth**-0.5 * LOG2E)
        x = tl.reshape(x, (QUERIES, LINES, LINE)) + along_width
        new = tl.maximum(largest, tl.max(tl.max(x, 2) + along_height, 1))
        p = tl.math.exp2(x - (new[:, None] - along_height)[:, :, None])
        p = tl.reshape(p, (QUERIES, LINES * LINE))
        decay = tl.math.exp2(largest - new)
        total = total * decay + tl.sum(p, 1)
        v = load_keys(qkv + 2 * PART, bias + 2 * PART, at, real, within, STEP, L)
        mixed = tl.dot(p.to(v.dtype), v, mixed * decay[:, None], input_precision="ieee")
        largest = new
    to = out + first * PART + head * L.depth
    store(to, token, inside, mixed / total[:, None], PART, L)
    tl.store(sums + line, largest + tl.math.log2(total), mask=exists)


@triton.jit
def backward_queries_kernel(
    qkv, bias, rows, columns, out, gradient, sums, delta, dqkv, drows, dcolumns, L: tl.constexpr
):
    """Compute `delta` (output . gradient) and the gradients of a block's queries and q . R."""
    QUERIES: tl.constexpr = L.queries
    LINES: tl.constexpr = L.lines
    LINE: tl.constexpr = L.column_tile
    AREA: tl.constexpr = L.rows * L.columns
    BLOCKS: tl.constexpr = (AREA + QUERIES - 1) // QUERIES
    group = tl.program_id(0) // BLOCKS
    begin = tl.program_id(0) % BLOCKS * QUERIES
    first, top, left, head = origin(group, L)
    if top + begin // L.columns >= L.height:
        return
    CHANNELS: tl.constexpr = L.channels
    PART: tl.constexpr = L.heads * L.depth
    STEP: tl.constexpr = 3 * PART
    qkv += first * STEP + head * L.depth
    bias += head * L.depth
    i = begin + tl.arange(0, QUERIES)
    token, exists, inside = tokens(i // L.columns, i % L.columns, top, left, L)
    line = group.to(tl.int64) * AREA + i
    o = load(out + first * PART + head * L.depth, token, inside, PART, L)
    do = load(gradient + first * PART + head * L.depth, token, inside, PART, L)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + line, product, mask=exists)
    q = load(qkv, token, inside, STEP, L)
    at_columns = line[:, None] * LINE + tl.arange(0, LINE)[None, :]
    along_width = tl.load(columns + at_columns, mask=exists[:, None], other=0.0).to(tl.float32)
    along_width = (along_width - tl.load(sums + line, mask=exists, other=0.0)[:, None])[:, None, :]
    dq = tl.zeros((QUERIES, CHANNELS), tl.float32)
    d_width = tl.zeros((QUERIES, LINE), tl.float32)
    key = tl.arange(0, LINES * LINE)
    for start in range(0, L.rows, LINES):
        at, real, within = tokens(start + key // LINE, key % LINE, top, left, L)
        row = (start + tl.arange(0, LINES))[None, :]
        along_height = load_rows(rows, group, row, i[:, None], exists[:, None], L, LINES)
        k = load_keys(qkv + PART, bias + PART, at, real, within, STEP, L)
        v = load_keys(qkv + 2 * PART, bias + 2 * PART, at, real, within, STEP, L)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * (L.depth**-0.5 * LOG2E)
        x = tl.reshape(x, (QUERIES, LINES, LINE)) + (along_width + along_height[:, :, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee") - product[:, None]
        ds = tl.math.exp2(x) * tl.reshape(dp, (QUERIES, LINES, LINE))
        d_width += tl.sum(ds, 1)
        at_rows = (group.to(tl.int64) * L.rows + row) * AREA + i[:, None]
        d_height = tl.sum(ds, 2).to(drows.dtype.element_ty)
        tl.store(drows + at_rows, d_height, mask=exists[:, None] & (row < L.rows))
        ds = tl.reshape(ds, (QUERIES, LINES * LINE)).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    to = dqkv + first * STEP + head * L.depth
    store(to, token, inside, dq * L.depth**-0.5, STEP, L)
    tl.store(dcolumns + at_columns, d_width.to(dcolumns.dtype.element_ty), mask=exists[:, None])


@triton.jit
def backward_keys_kernel(
    qkv, bias, rows, columns, gradient, sums, delta, dqkv, beyond, L: tl.constexpr
):
    """Compute the gradients of a block of keys and values, with transposed logits."""
    QUERIES: tl.constexpr = L.queries
    LINES: tl.constexpr = L.lines
    LINE: tl.constexpr = L.column_tile
    BLOCKS: tl.constexpr = (L.rows + LINES - 1) // LINES
    group = tl.program_id(0) // BLOCKS
    first, top, left, head = origin(group, L)
    AREA: tl.constexpr = L.rows * L.columns
    CHANNELS: tl.constexpr = L.channels
    PART: tl.constexpr = L.heads * L.depth
    STEP: tl.constexpr = 3 * PART
    qkv += first * STEP + head * L.depth
    gradient += first * PART + head * L.depth
    bias += head * L.depth
    key = tl.arange(0, LINES * LINE)
    start = tl.program_id(0) % BLOCKS * LINES
    at, real, within = tokens(start + key // LINE, key % LINE, top, left, L)
    k = load_keys(qkv + PART, bias + PART, at, real, within, STEP, L)
    v = load_keys(qkv + 2 * PART, bias + 2 * PART, at, real, within, STEP, L)
    row = start + tl.arange(0, LINES)
    column = tl.arange(0, LINE)
    dk = tl.zeros((LINES * LINE, CHANNELS), tl.float32)
    dv = tl.zeros((LINES * LINE, CHANNELS), tl.float32)
    for begin in range(0, tl.minimum(L.height - top, L.rows) * L.columns, QUERIES):
        i = begin + tl.arange(0, QUERIES)
        token, exists, inside = tokens(i // L.columns, i % L.columns, top, left, L)
        q = load(qkv, token, inside, STEP, L)
        do = load(gradient, token, inside, PART, L)
        line = group.to(tl.int64) * AREA + i
        along_height = load_rows(rows, group, row[:, None], i[None, :], exists[None, :], L, LINES)
        # queries beyond the grid have no output
        along_height -= tl.load(sums + line, mask=inside, other=float("inf"))[None, :]
        along_width = columns + line[:, None] * LINE + column[None, :]
        along_width = tl.trans(tl.load(along_width, mask=exists[:, None], other=0.0))
        product = tl.load(delta + line, mask=inside, other=0.0)
        x = tl.dot(k, tl.trans(q), input_precision="ieee") * (L.depth**-0.5 * LOG2E)
        x = tl.reshape(x, (LINES, LINE, QUERIES))
        x += along_width.to(tl.float32)[None, :, :] + along_height[:, None, :]
        p = tl.math.exp2(tl.reshape(x, (LINES * LINE, QUERIES)))
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - product[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk *= L.depth**-0.5
    to = dqkv + first * STEP + head * L.depth
    store(to + PART, at, within, dk, STEP, L)
    store(to + 2 * PART, at, within, dv, STEP, L)
    if L.height % L.rows + L.width % L.columns > 0:
        if (top + L.rows > L.height) | (left + L.columns > L.width):
            outside = (real & ~within)[:, None]
            channel = tl.arange(0, L.channels)
            total = beyond + tl.program_id(0).to(tl.int64) * (2 * L.depth) + channel
            tl.store(total, tl.sum(tl.where(outside, dk, 0.0), 0), mask=channel < L.depth)
            tl.store(total + L.depth, tl.sum(tl.where(outside, dv, 0.0), 0), mask=channel < L.depth)
