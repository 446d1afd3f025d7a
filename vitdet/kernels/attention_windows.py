"""Attention in windows with decomposed relative positions, read and written in the grid: the Triton kernels.

Windows that go beyond the grid are filled up with tokens of zeros, whose projection is its bias: they are read from
there, so that nothing is split, padded or joined, and the projections around take the grid's tokens alone.
A window's side divides no tile, so positions are spread over its keys by a matrix product with ones at each key's row
and column, which are made in registers.
Letters: B images, h heads, d channels of a head, N tokens of the grid.
"""
# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdet.kernels.attention_grid import Blocks, load_rows, store_rows
from vitdet.kernels.attention_positions import (
    LOG2E,
    Layout,
    Products,
    corner,
    gradients,
    products,
    tile,
)

# Measured on an H100 with windows of 14 x 14 tokens and d = 64.
FORWARD = Blocks(64, 4, 2)
BACKWARD_QUERIES = Blocks(64, 4, 2)
BACKWARD_KEYS = Blocks(64, 4, 2)
KEYS = 64  # of a block


def forward(
    layout: Layout, qkv: Tensor, bias: Tensor, tables: tuple[Tensor, Tensor], factor: float
) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3 h d), its bias (3 h d) -> what the heads read (B, N, h d), and the logarithms to base 2 of the sums
    (groups, tokens of a window).
    """
    positions = products(layout, qkv, tables, factor).rows
    area = layout.window**2
    out = qkv.new_empty(layout.batch, layout.tokens, layout.heads * layout.depth)
    sums = qkv.new_empty(layout.groups, area, dtype=torch.float32)
    queries, warps, stages = FORWARD
    forward_kernel[(triton.cdiv(area, queries), layout.groups)](
        qkv,
        bias,
        positions,
        out,
        sums,
        *_geometry(layout),
        **_sizes(layout, queries),
        num_warps=warps,
        num_stages=stages,
    )
    return out, sums


def backward(
    layout: Layout,
    gradient: Tensor,
    qkv: Tensor,
    bias: Tensor,
    tables: tuple[Tensor, Tensor],
    factor: float,
    out: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of qkv, of its bias and of both tables (these float32), from that of `out`.

    The bias has one as far as it stands in for tokens outside of the grid.
    """
    positions = products(layout, qkv, tables, factor).rows
    logits = Products.empty(layout, qkv)
    area, heads, depth = layout.window**2, layout.heads, layout.depth
    dqkv, delta = torch.empty_like(qkv), torch.empty_like(sums)
    queries, warps, stages = BACKWARD_QUERIES
    backward_queries_kernel[(triton.cdiv(area, queries), layout.groups)](
        qkv,
        bias,
        positions,
        out,
        gradient,
        sums,
        delta,
        dqkv,
        logits.rows,
        *_geometry(layout),
        **_sizes(layout, queries),
        num_warps=warps,
        num_stages=stages,
    )
    queries, warps, stages = BACKWARD_KEYS
    blocks = triton.cdiv(area, KEYS)
    outside = sums.new_empty(layout.batch * layout.areas, heads, blocks, 2, depth)
    backward_keys_kernel[(blocks, layout.groups)](
        qkv,
        bias,
        positions,
        gradient,
        sums,
        delta,
        dqkv,
        outside,
        *_geometry(layout),
        **_sizes(layout, queries),
        num_warps=warps,
        num_stages=stages,
    )
    dbias = sums.new_zeros(3, heads, depth)
    dbias[1:] = outside.sum(dim=(0, 2)).transpose(0, 1)
    return dqkv, dbias.view(-1), *gradients(layout, qkv, tables, factor, logits, dqkv)


def _geometry(layout: Layout) -> tuple[int, int, int, int, float]:
    return layout.areas, layout.across, layout.height, layout.width, layout.scale


def _sizes(layout: Layout, queries: int) -> dict[str, int]:
    """Constants of the kernels of this file."""
    return {
        "WINDOW": layout.window,
        "SIDE": tile(layout.window),
        "HEADS": layout.heads,
        "DEPTH": layout.depth,
        "CHANNELS": layout.tile,
        "QUERIES": queries,
        "KEYS": KEYS,
    }


@triton.jit
def tokens_of(i, top, left, height, width, WINDOW: tl.constexpr):
    """Token i of a window in the grid, and whether it lies in it."""
    row = top + i // WINDOW
    column = left + i % WINDOW
    inside = (i < WINDOW * WINDOW) & (row < height) & (column < width)
    return row * width + column, inside


@triton.jit
def load_keys(
    base,
    bias,
    token,
    inside,
    exists,
    STEP: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Keys or values of a window, which outside of the grid are the bias."""
    x = load_rows(base, token, inside, STEP, DEPTH, CHANNELS)
    channel = tl.arange(0, CHANNELS)
    beyond = tl.load(bias + channel, mask=channel < DEPTH, other=0.0).to(x.dtype)
    return tl.where((exists & ~inside)[:, None], beyond[None, :], x)


@triton.jit
def ones_at(i, dtype: tl.constexpr, WINDOW: tl.constexpr, SIDE: tl.constexpr):
    """(2 SIDE, keys): 1 in the row of a key's row, and in that of its column."""
    place = tl.arange(0, 2 * SIDE)[:, None]
    row = (i // WINDOW)[None, :]
    column = (i % WINDOW)[None, :] + SIDE
    return ((place == row) | (place == column)).to(dtype)


@triton.jit
def forward_kernel(
    qkv,
    bias,
    positions,
    out,
    sums,
    areas,
    across,
    height,
    width,
    scale,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of a window's queries over its keys, with a running maximum."""
    first = tl.program_id(0) * QUERIES
    group = tl.program_id(1)
    head = group % HEADS
    image, top, left = corner(group // HEADS, areas, across, WINDOW, WINDOW)
    if top + first // WINDOW >= height:
        return
    AREA: tl.constexpr = WINDOW * WINDOW
    STEP: tl.constexpr = 3 * HEADS * DEPTH
    base = qkv + image.to(tl.int64) * height * width * STEP + head * DEPTH
    i = first + tl.arange(0, QUERIES)
    token, inside = tokens_of(i, top, left, height, width, WINDOW)
    q = load_rows(base, token, inside, STEP, DEPTH, CHANNELS)
    line = group.to(tl.int64) * AREA + i
    place = tl.arange(0, 2 * SIDE)
    rel = tl.load(
        positions + line[:, None] * (2 * SIDE) + place[None, :],
        mask=(i < AREA)[:, None],
        other=0.0,
    )
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, CHANNELS), tl.float32)
    for start in range(0, AREA, KEYS):
        j = start + tl.arange(0, KEYS)
        at, within = tokens_of(j, top, left, height, width, WINDOW)
        PART: tl.constexpr = HEADS * DEPTH
        head_bias = bias + head * DEPTH
        k = load_keys(base + PART, head_bias + PART, at, within, j < AREA, STEP, DEPTH, CHANNELS)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        x = tl.dot(rel, ones_at(j, rel.dtype, WINDOW, SIDE), x, input_precision="ieee")
        x = tl.where((j < AREA)[None, :], x, float("-inf"))
        new = tl.maximum(largest, tl.max(x, 1))
        p = tl.math.exp2(x - new[:, None])
        decay = tl.math.exp2(largest - new)
        total = total * decay + tl.sum(p, 1)
        v = load_keys(
            base + 2 * PART, head_bias + 2 * PART, at, within, j < AREA, STEP, DEPTH, CHANNELS
        )
        mixed = tl.dot(p.to(v.dtype), v, mixed * decay[:, None], input_precision="ieee")
        largest = new
    to = out + image.to(tl.int64) * height * width * (HEADS * DEPTH) + head * DEPTH
    store_rows(to, token, inside, mixed / total[:, None], HEADS * DEPTH, DEPTH, CHANNELS)
    tl.store(sums + line, largest + tl.math.log2(total), mask=i < AREA)


@triton.jit
def backward_queries_kernel(
    qkv,
    bias,
    positions,
    out,
    gradient,
    sums,
    delta,
    dqkv,
    logits,
    areas,
    across,
    height,
    width,
    scale,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of a window's queries over its keys: its gradient, that of its positions, and `delta`."""
    first = tl.program_id(0) * QUERIES
    group = tl.program_id(1)
    head = group % HEADS
    image, top, left = corner(group // HEADS, areas, across, WINDOW, WINDOW)
    if top + first // WINDOW >= height:
        return
    AREA: tl.constexpr = WINDOW * WINDOW
    PART: tl.constexpr = HEADS * DEPTH
    start_of_image = image.to(tl.int64) * height * width * PART
    base = qkv + 3 * start_of_image + head * DEPTH
    i = first + tl.arange(0, QUERIES)
    token, inside = tokens_of(i, top, left, height, width, WINDOW)
    shift = start_of_image + head * DEPTH
    o = load_rows(out + shift, token, inside, PART, DEPTH, CHANNELS)
    do = load_rows(gradient + shift, token, inside, PART, DEPTH, CHANNELS)
    q = load_rows(base, token, inside, 3 * PART, DEPTH, CHANNELS)
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    line = group.to(tl.int64) * AREA + i
    tl.store(delta + line, product, mask=i < AREA)
    largest = tl.load(sums + line, mask=i < AREA, other=0.0)
    tile = line[:, None] * (2 * SIDE) + tl.arange(0, 2 * SIDE)[None, :]
    rel = tl.load(positions + tile, mask=(i < AREA)[:, None], other=0.0)
    dq = tl.zeros((QUERIES, CHANNELS), tl.float32)
    drel = tl.zeros((QUERIES, 2 * SIDE), tl.float32)
    for start in range(0, AREA, KEYS):
        j = start + tl.arange(0, KEYS)
        at, within = tokens_of(j, top, left, height, width, WINDOW)
        head_bias = bias + head * DEPTH
        k = load_keys(
            base + PART, head_bias + PART, at, within, j < AREA, 3 * PART, DEPTH, CHANNELS
        )
        v = load_keys(
            base + 2 * PART, head_bias + 2 * PART, at, within, j < AREA, 3 * PART, DEPTH, CHANNELS
        )
        ones = ones_at(j, rel.dtype, WINDOW, SIDE)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        x = tl.dot(rel, ones, x, input_precision="ieee")
        p = tl.where((j < AREA)[None, :], tl.math.exp2(x - largest[:, None]), 0.0)
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - product[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
        drel = tl.dot(ds.to(k.dtype), tl.trans(ones), drel, input_precision="ieee")
    store_rows(
        dqkv + 3 * start_of_image + head * DEPTH,
        token,
        inside,
        dq * scale,
        3 * PART,
        DEPTH,
        CHANNELS,
    )
    tl.store(logits + tile, drel.to(logits.dtype.element_ty), mask=(i < AREA)[:, None])


@triton.jit
def backward_keys_kernel(
    qkv,
    bias,
    positions,
    gradient,
    sums,
    delta,
    dqkv,
    outside,
    areas,
    across,
    height,
    width,
    scale,
    WINDOW: tl.constexpr,
    SIDE: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of a window's keys over its queries in the grid; the gradients of those beyond are summed for the bias."""
    block = tl.program_id(0)
    group = tl.program_id(1)
    head = group % HEADS
    image, top, left = corner(group // HEADS, areas, across, WINDOW, WINDOW)
    AREA: tl.constexpr = WINDOW * WINDOW
    PART: tl.constexpr = HEADS * DEPTH
    start_of_image = image.to(tl.int64) * height * width * PART
    base = qkv + 3 * start_of_image + head * DEPTH
    given = gradient + start_of_image + head * DEPTH
    head_bias = bias + head * DEPTH
    j = block * KEYS + tl.arange(0, KEYS)
    at, within = tokens_of(j, top, left, height, width, WINDOW)
    k = load_keys(base + PART, head_bias + PART, at, within, j < AREA, 3 * PART, DEPTH, CHANNELS)
    v = load_keys(
        base + 2 * PART, head_bias + 2 * PART, at, within, j < AREA, 3 * PART, DEPTH, CHANNELS
    )
    ones = ones_at(j, k.dtype, WINDOW, SIDE)
    dk = tl.zeros((KEYS, CHANNELS), tl.float32)
    dv = tl.zeros((KEYS, CHANNELS), tl.float32)
    for start in range(0, tl.minimum(height - top, WINDOW) * WINDOW, QUERIES):
        i = start + tl.arange(0, QUERIES)
        token, inside = tokens_of(i, top, left, height, width, WINDOW)
        q = load_rows(base, token, inside, 3 * PART, DEPTH, CHANNELS)
        do = load_rows(given, token, inside, PART, DEPTH, CHANNELS)
        line = group.to(tl.int64) * AREA + i
        rel = tl.load(
            positions + line[:, None] * (2 * SIDE) + tl.arange(0, 2 * SIDE)[None, :],
            mask=inside[:, None],
            other=0.0,
        )
        largest = tl.load(sums + line, mask=inside, other=float("inf"))
        product = tl.load(delta + line, mask=inside, other=0.0)
        x = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        x = tl.dot(tl.trans(ones), tl.trans(rel), x, input_precision="ieee")
        p = tl.where((j < AREA)[:, None], tl.math.exp2(x - largest[None, :]), 0.0)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - product[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    dk *= scale
    to = dqkv + 3 * start_of_image + head * DEPTH
    store_rows(to + PART, at, within, dk, 3 * PART, DEPTH, CHANNELS)
    store_rows(to + 2 * PART, at, within, dv, 3 * PART, DEPTH, CHANNELS)
    beyond = ((j < AREA) & ~within)[:, None]
    channel = tl.arange(0, CHANNELS)
    sums_at = outside + (group.to(tl.int64) * tl.num_programs(0) + block) * (2 * DEPTH) + channel
    tl.store(sums_at, tl.sum(tl.where(beyond, dk, 0.0), 0), mask=channel < DEPTH)
    tl.store(sums_at + DEPTH, tl.sum(tl.where(beyond, dv, 0.0), 0), mask=channel < DEPTH)
