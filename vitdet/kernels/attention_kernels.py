"""The Triton kernels of `vitdet.kernels.attention`, and their launches.

Tokens attend to each other within an area: a window, or the whole grid. A block of keys is some of
its rows, each padded to a power of 2. The position along the height is then one number per query
and row of keys, and the positions along the width are the same tile for every row, kept in
registers; their gradients are row sums and sums of rows of the logits' gradient. So positions need
no matrix product, and queries and keys are not widened. Windows are read and written in the grid;
tokens beyond it are the projection's bias.

The backward pass computes the logits twice, per queries and per keys (7 products instead of 5), so
that it needs no atomics and is deterministic.

Letters: B images, h heads, d channels of a head, N tokens of the grid, K tokens along an axis of an
area.
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
    empty_products,
    load,
    origin,
    positions,
    positions_backward,
    store,
    tile,
    tokens,
)


class Blocks(NamedTuple):
    """Block sizes of queries and keys (at least a row of keys), warps per program, pipeline stages.

    `registers`: maximum per thread, for higher occupancy; None: chosen by the compiler.
    """

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int | None = None


# By whether the area is the grid (64 x 64 tokens) or a window (14 x 14): among the best on an H200
# with d = 64 (`tests/bench/attention.py`); a limit of registers gains 5 to 9 % there but would
# spill with wider heads.
FORWARD = {True: Blocks(64, 64, 4, 3), False: Blocks(64, 64, 4, 2)}
BACKWARD_QUERIES = {True: Blocks(64, 64, 4, 3), False: Blocks(64, 64, 4, 2)}
BACKWARD_KEYS = {True: Blocks(64, 64, 4, 2), False: Blocks(64, 64, 4, 2)}


def forward(
    layout: Layout, qkv: Tensor, bias: Tensor, tables: tuple[Tensor, Tensor], factor: float
) -> tuple[Tensor, Tensor]:
    """Return the heads' output (B, N, h d) and the base-2 logarithms of the softmax's sums (B
    groups, tokens of an area).

    qkv (B, N, 3 h d), its bias (3 h d), tables of relative positions (2 K - 1, d), multiplied by
    `factor`.
    """
    batch, tokens, channels = qkv.shape
    out = qkv.new_empty(batch, tokens, channels // 3)
    sums = qkv.new_empty(batch * layout.groups, layout.area, dtype=torch.float32)
    constants = _blocks(layout, FORWARD)
    programs = triton.cdiv(layout.area, constants["QUERIES"]) * len(sums)
    products = positions(layout, qkv, tables, factor)
    launch(forward_kernel, programs, (qkv, bias, *products, out, sums), constants)
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
    """Return the gradients of qkv, bias (for tokens beyond the grid) and both tables, given that of
    `out`; all but the first in float32.
    """
    # recomputed, to save memory
    products = positions(layout, qkv, tables, factor)
    dproducts = empty_products(layout, qkv)
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(sums)
    constants = _blocks(layout, BACKWARD_QUERIES)
    programs = triton.cdiv(layout.area, constants["QUERIES"]) * len(sums)
    given = qkv, bias, *products, out, gradient, sums
    launch(backward_queries_kernel, programs, (*given, delta, dqkv, *dproducts), constants)
    constants = _blocks(layout, BACKWARD_KEYS)
    blocks = triton.cdiv(layout.sides[0], constants["LINES"])
    # of each block of keys and values: the part beyond the grid
    size = (len(sums) // layout.heads, layout.heads, blocks if layout.padded else 0)
    beyond = sums.new_zeros(*size, 2, layout.depth)
    given = qkv, bias, *products, gradient, sums, delta
    launch(backward_keys_kernel, blocks * len(sums), (*given, dqkv, beyond), constants)
    dbias = F.pad(beyond.sum(dim=(0, 2)).transpose(0, 1), (0, 0, 0, 0, 1, 0))
    return (
        dqkv,
        dbias.reshape(-1),
        *positions_backward(layout, qkv, tables, factor, dproducts, dqkv),
    )


def _blocks(layout: Layout, choice: dict[bool, Blocks]) -> dict[str, Any]:
    """Return the constants of the kernels of this file."""
    blocks, line = choice[layout.window == 0], tile(layout.sides[1])
    return layout.constants | {
        "QUERIES": blocks.queries,
        "LINE": line,
        "LINES": max(1, blocks.keys // line),
        "num_warps": blocks.warps,
        "num_stages": blocks.stages,
        "maxnreg": blocks.registers,
    }


def launch(
    kernel: Any, programs: int, tensors: Sequence[Tensor], constants: dict[str, Any]
) -> None:
    """Launch a kernel; with fewer stages on GPUs with less than an H100's 227 KiB shared memory."""
    try:
        kernel[(programs,)](*tensors, **constants)
    except triton.runtime.errors.OutOfResources:
        if constants["num_stages"] == 1:
            raise
        fewer = constants | {"num_stages": constants["num_stages"] - 1}
        launch(kernel, programs, tensors, fewer)


@triton.jit
def load_keys(x, bias, token, exists, inside, step, DEPTH, CHANNELS: tl.constexpr, PADDED):
    """`load` for keys or values; beyond the grid they are read from the bias."""
    channel = tl.arange(0, CHANNELS)[None, :]
    at = x + token[:, None] * step + channel
    if PADDED:
        at = tl.where(inside[:, None], at, bias + channel)
    return tl.load(at, mask=exists[:, None] & (channel < DEPTH), other=0.0)


@triton.jit
def load_rows(rows, group, row, i, exists, ROWS, LINES, AREA):
    """Load q . R of queries i with rows of keys, of shape row x i or i x row: -inf beyond the last
    row.
    """
    at = rows + (group.to(tl.int64) * ROWS + row) * AREA + i
    if ROWS % LINES == 0:
        found = tl.load(at, mask=exists, other=0.0).to(tl.float32)
    else:
        found = tl.load(at, mask=exists & (row < ROWS), other=0.0).to(tl.float32)
        found = tl.where(row < ROWS, found, float("-inf"))
    return found


@triton.jit
def forward_kernel(
    qkv,
    bias,
    rows,
    columns,
    out,
    sums,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    LINE: tl.constexpr,
    LINES: tl.constexpr,
):
    """One block of queries over all keys, with a running maximum (Dao, FlashAttention-2,
    2307.08691).
    """
    AREA: tl.constexpr = ROWS * COLUMNS
    BLOCKS: tl.constexpr = (AREA + QUERIES - 1) // QUERIES
    group = tl.program_id(0) // BLOCKS
    begin = tl.program_id(0) % BLOCKS * QUERIES
    first, top, left, head = origin(group, HEIGHT, WIDTH, HEADS, ROWS, COLUMNS)
    if top + begin // COLUMNS >= HEIGHT:
        return
    PART: tl.constexpr = HEADS * DEPTH
    PADDED: tl.constexpr = HEIGHT % ROWS + WIDTH % COLUMNS > 0
    qkv += first * (3 * PART) + head * DEPTH
    bias += head * DEPTH
    i = begin + tl.arange(0, QUERIES)
    token, exists, inside = tokens(
        i // COLUMNS, i % COLUMNS, top, left, HEIGHT, WIDTH, ROWS, COLUMNS
    )
    line = group.to(tl.int64) * AREA + i
    q = load(qkv, token, inside, 3 * PART, DEPTH, CHANNELS)
    along_width = columns + line[:, None] * LINE + tl.arange(0, LINE)[None, :]
    along_width = tl.load(along_width, mask=exists[:, None], other=0.0).to(tl.float32)[:, None, :]
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, CHANNELS), tl.float32)
    key = tl.arange(0, LINES * LINE)
    for start in range(0, ROWS, LINES):
        at, real, within = tokens(
            start + key // LINE, key % LINE, top, left, HEIGHT, WIDTH, ROWS, COLUMNS
        )
        row = start + tl.arange(0, LINES)
        along_height = load_rows(
            rows, group, row[None, :], i[:, None], exists[:, None], ROWS, LINES, AREA
        )
        k = load_keys(qkv + PART, bias + PART, at, real, within, 3 * PART, DEPTH, CHANNELS, PADDED)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * (DEPTH**-0.5 * LOG2E)
        x = tl.reshape(x, (QUERIES, LINES, LINE)) + along_width
        new = tl.maximum(largest, tl.max(tl.max(x, 2) + along_height, 1))
        p = tl.math.exp2(x - (new[:, None] - along_height)[:, :, None])
        p = tl.reshape(p, (QUERIES, LINES * LINE))
        decay = tl.math.exp2(largest - new)
        total = total * decay + tl.sum(p, 1)
        v = load_keys(
            qkv + 2 * PART, bias + 2 * PART, at, real, within, 3 * PART, DEPTH, CHANNELS, PADDED
        )
        mixed = tl.dot(p.to(v.dtype), v, mixed * decay[:, None], input_precision="ieee")
        largest = new
    to = out + first * PART + head * DEPTH
    store(to, token, inside, mixed / total[:, None], PART, DEPTH, CHANNELS)
    tl.store(sums + line, largest + tl.math.log2(total), mask=exists)


@triton.jit
def backward_queries_kernel(
    qkv,
    bias,
    rows,
    columns,
    out,
    gradient,
    sums,
    delta,
    dqkv,
    drows,
    dcolumns,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    LINE: tl.constexpr,
    LINES: tl.constexpr,
):
    """One block of queries over all keys: gradients of queries and positions, and `delta` for the
    keys.
    """
    AREA: tl.constexpr = ROWS * COLUMNS
    BLOCKS: tl.constexpr = (AREA + QUERIES - 1) // QUERIES
    group = tl.program_id(0) // BLOCKS
    begin = tl.program_id(0) % BLOCKS * QUERIES
    first, top, left, head = origin(group, HEIGHT, WIDTH, HEADS, ROWS, COLUMNS)
    if top + begin // COLUMNS >= HEIGHT:
        return
    PART: tl.constexpr = HEADS * DEPTH
    PADDED: tl.constexpr = HEIGHT % ROWS + WIDTH % COLUMNS > 0
    qkv += first * (3 * PART) + head * DEPTH
    bias += head * DEPTH
    i = begin + tl.arange(0, QUERIES)
    token, exists, inside = tokens(
        i // COLUMNS, i % COLUMNS, top, left, HEIGHT, WIDTH, ROWS, COLUMNS
    )
    line = group.to(tl.int64) * AREA + i
    o = load(out + first * PART + head * DEPTH, token, inside, PART, DEPTH, CHANNELS)
    do = load(gradient + first * PART + head * DEPTH, token, inside, PART, DEPTH, CHANNELS)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + line, product, mask=exists)
    q = load(qkv, token, inside, 3 * PART, DEPTH, CHANNELS)
    at_columns = line[:, None] * LINE + tl.arange(0, LINE)[None, :]
    along_width = tl.load(columns + at_columns, mask=exists[:, None], other=0.0).to(tl.float32)
    along_width = (along_width - tl.load(sums + line, mask=exists, other=0.0)[:, None])[:, None, :]
    dq = tl.zeros((QUERIES, CHANNELS), tl.float32)
    d_width = tl.zeros((QUERIES, LINE), tl.float32)
    key = tl.arange(0, LINES * LINE)
    for start in range(0, ROWS, LINES):
        at, real, within = tokens(
            start + key // LINE, key % LINE, top, left, HEIGHT, WIDTH, ROWS, COLUMNS
        )
        row = (start + tl.arange(0, LINES))[None, :]
        along_height = load_rows(rows, group, row, i[:, None], exists[:, None], ROWS, LINES, AREA)
        k = load_keys(qkv + PART, bias + PART, at, real, within, 3 * PART, DEPTH, CHANNELS, PADDED)
        v = load_keys(
            qkv + 2 * PART, bias + 2 * PART, at, real, within, 3 * PART, DEPTH, CHANNELS, PADDED
        )
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * (DEPTH**-0.5 * LOG2E)
        x = tl.reshape(x, (QUERIES, LINES, LINE)) + (along_width + along_height[:, :, None])
        dp = tl.dot(do, tl.trans(v), input_precision="ieee") - product[:, None]
        ds = tl.math.exp2(x) * tl.reshape(dp, (QUERIES, LINES, LINE))
        d_width += tl.sum(ds, 1)
        at_rows = (group.to(tl.int64) * ROWS + row) * AREA + i[:, None]
        d_height = tl.sum(ds, 2).to(drows.dtype.element_ty)
        tl.store(drows + at_rows, d_height, mask=exists[:, None] & (row < ROWS))
        ds = tl.reshape(ds, (QUERIES, LINES * LINE)).to(k.dtype)
        dq = tl.dot(ds, k, dq, input_precision="ieee")
    to = dqkv + first * (3 * PART) + head * DEPTH
    store(to, token, inside, dq * DEPTH**-0.5, 3 * PART, DEPTH, CHANNELS)
    tl.store(dcolumns + at_columns, d_width.to(dcolumns.dtype.element_ty), mask=exists[:, None])


@triton.jit
def backward_keys_kernel(
    qkv,
    bias,
    rows,
    columns,
    gradient,
    sums,
    delta,
    dqkv,
    beyond,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERIES: tl.constexpr,
    LINE: tl.constexpr,
    LINES: tl.constexpr,
):
    """One block of keys over all queries in the grid. Logits are transposed, to multiply from
    registers.
    """
    BLOCKS: tl.constexpr = (ROWS + LINES - 1) // LINES
    group = tl.program_id(0) // BLOCKS
    first, top, left, head = origin(group, HEIGHT, WIDTH, HEADS, ROWS, COLUMNS)
    AREA: tl.constexpr = ROWS * COLUMNS
    PART: tl.constexpr = HEADS * DEPTH
    PADDED: tl.constexpr = HEIGHT % ROWS + WIDTH % COLUMNS > 0
    qkv += first * (3 * PART) + head * DEPTH
    gradient += first * PART + head * DEPTH
    bias += head * DEPTH
    key = tl.arange(0, LINES * LINE)
    start = tl.program_id(0) % BLOCKS * LINES
    at, real, within = tokens(
        start + key // LINE, key % LINE, top, left, HEIGHT, WIDTH, ROWS, COLUMNS
    )
    k = load_keys(qkv + PART, bias + PART, at, real, within, 3 * PART, DEPTH, CHANNELS, PADDED)
    v = load_keys(
        qkv + 2 * PART, bias + 2 * PART, at, real, within, 3 * PART, DEPTH, CHANNELS, PADDED
    )
    row = start + tl.arange(0, LINES)
    column = tl.arange(0, LINE)
    dk = tl.zeros((LINES * LINE, CHANNELS), tl.float32)
    dv = tl.zeros((LINES * LINE, CHANNELS), tl.float32)
    for begin in range(0, tl.minimum(HEIGHT - top, ROWS) * COLUMNS, QUERIES):
        i = begin + tl.arange(0, QUERIES)
        token, exists, inside = tokens(
            i // COLUMNS, i % COLUMNS, top, left, HEIGHT, WIDTH, ROWS, COLUMNS
        )
        q = load(qkv, token, inside, 3 * PART, DEPTH, CHANNELS)
        do = load(gradient, token, inside, PART, DEPTH, CHANNELS)
        line = group.to(tl.int64) * AREA + i
        along_height = load_rows(
            rows, group, row[:, None], i[None, :], exists[None, :], ROWS, LINES, AREA
        )
        # queries beyond the grid have no output
        along_height -= tl.load(sums + line, mask=inside, other=float("inf"))[None, :]
        along_width = columns + line[:, None] * LINE + column[None, :]
        along_width = tl.trans(tl.load(along_width, mask=exists[:, None], other=0.0))
        product = tl.load(delta + line, mask=inside, other=0.0)
        x = tl.dot(k, tl.trans(q), input_precision="ieee") * (DEPTH**-0.5 * LOG2E)
        x = tl.reshape(x, (LINES, LINE, QUERIES))
        x += along_width.to(tl.float32)[None, :, :] + along_height[:, None, :]
        p = tl.math.exp2(tl.reshape(x, (LINES * LINE, QUERIES)))
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - product[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk *= DEPTH**-0.5
    to = dqkv + first * (3 * PART) + head * DEPTH
    store(to + PART, at, within, dk, 3 * PART, DEPTH, CHANNELS)
    store(to + 2 * PART, at, within, dv, 3 * PART, DEPTH, CHANNELS)
    if PADDED:
        if (top + ROWS > HEIGHT) | (left + COLUMNS > WIDTH):
            outside = (real & ~within)[:, None]
            channel = tl.arange(0, CHANNELS)
            total = beyond + tl.program_id(0).to(tl.int64) * (2 * DEPTH) + channel
            tl.store(total, tl.sum(tl.where(outside, dk, 0.0), 0), mask=channel < DEPTH)
            tl.store(total + DEPTH, tl.sum(tl.where(outside, dv, 0.0), 0), mask=channel < DEPTH)
