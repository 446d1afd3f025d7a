"""Attention of all tokens of a grid with decomposed relative positions: the Triton kernels.

A block of keys is one row of the grid. Then the position along the height is one number for a query and a block, and
the positions along the width are the same tile for every block, which stays in registers; their gradients are row sums
of the logits' gradient, and the sum of its tiles. So the positions cost no matrix product here, and queries and keys
stay as narrow as a head (widened to d + H + W, the backward pass takes four times as long on an H100).
The backward pass makes 7 products instead of 5, for it computes the logits twice: once per queries, once per keys. It
needs no atomics that way, and its results do not depend on the order of the programs.
Letters: B images, h heads, d channels of a head, H x W tokens, N = H W.
"""
# ruff: noqa: ANN001, ANN201 (what Triton passes to a kernel has no Python type)

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vitdet.kernels.attention_positions import (
    LOG2E,
    Layout,
    Products,
    gradients,
    products,
    tile,
)


class Blocks(NamedTuple):
    """Queries of a block, warps of a program, stages of its loop's pipeline."""

    queries: int
    warps: int
    stages: int


# Measured on an H100 at 64 x 64 tokens and d = 64.
FORWARD = Blocks(64, 4, 3)
BACKWARD_QUERIES = Blocks(64, 4, 3)
BACKWARD_KEYS = Blocks(64, 4, 2)


def forward(
    layout: Layout, qkv: Tensor, tables: tuple[Tensor, Tensor], factor: float
) -> tuple[Tensor, Tensor]:
    """qkv (B, N, 3 h d) -> what the heads read (B, N, h d), and the logarithms to base 2 of the sums (B h, N)."""
    positions = products(layout, qkv, tables, factor)
    out = qkv.new_empty(layout.batch, layout.tokens, layout.heads * layout.depth)
    sums = qkv.new_empty(layout.groups, layout.tokens, dtype=torch.float32)
    queries, warps, stages = FORWARD
    forward_kernel[(triton.cdiv(layout.tokens, queries), layout.groups)](
        qkv,
        *positions,
        out,
        sums,
        layout.tokens,
        layout.height,
        layout.scale,
        **_sizes(layout, queries),
        num_warps=warps,
        num_stages=stages,
    )
    return out, sums


def backward(
    layout: Layout,
    gradient: Tensor,
    qkv: Tensor,
    tables: tuple[Tensor, Tensor],
    factor: float,
    out: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of qkv and of both tables (float32), from that of `out`."""
    # Computed again: that takes less time than it would cost memory to keep them from the forward pass.
    positions = products(layout, qkv, tables, factor)
    logits = Products.empty(layout, qkv)
    dqkv = torch.empty_like(qkv)
    delta = torch.empty_like(sums)
    queries, warps, stages = BACKWARD_QUERIES
    backward_queries_kernel[(triton.cdiv(layout.tokens, queries), layout.groups)](
        qkv,
        *positions,
        out,
        gradient,
        sums,
        delta,
        dqkv,
        *logits,
        layout.tokens,
        layout.height,
        layout.scale,
        **_sizes(layout, queries),
        num_warps=warps,
        num_stages=stages,
    )
    queries, warps, stages = BACKWARD_KEYS
    backward_keys_kernel[(layout.height, layout.groups)](
        qkv,
        *positions,
        gradient,
        sums,
        delta,
        dqkv,
        layout.tokens,
        layout.height,
        layout.scale,
        **_sizes(layout, queries),
        num_warps=warps,
        num_stages=stages,
    )
    return dqkv, *gradients(layout, qkv, tables, factor, logits, dqkv)


def _sizes(layout: Layout, queries: int) -> dict[str, int]:
    """Constants of the kernels of this file."""
    return {
        "WIDTH": layout.width,
        "HEADS": layout.heads,
        "DEPTH": layout.depth,
        "CHANNELS": layout.tile,
        "QUERIES": queries,
        "KEYS": tile(layout.width),
    }


@triton.jit
def load_rows(base, row, exists, STEP: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr):
    """The channels of one head of these rows: (rows, CHANNELS)."""
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = exists[:, None]
    if CHANNELS != DEPTH:
        mask = mask & (channel < DEPTH)
    return tl.load(base + row[:, None] * STEP + channel, mask=mask, other=0.0)


@triton.jit
def store_rows(
    base, row, exists, x, STEP: tl.constexpr, DEPTH: tl.constexpr, CHANNELS: tl.constexpr
):
    """The inverse of `load_rows`."""
    channel = tl.arange(0, CHANNELS)[None, :]
    mask = exists[:, None] & (channel < DEPTH)
    tl.store(base + row[:, None] * STEP + channel, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def head_of(x, group, tokens, HEADS: tl.constexpr, DEPTH: tl.constexpr, PARTS: tl.constexpr):
    """Where the first token of a group lies in (B, N, PARTS h d)."""
    return (
        x + (group // HEADS).to(tl.int64) * tokens * (PARTS * HEADS * DEPTH) + group % HEADS * DEPTH
    )


@triton.jit
def forward_kernel(
    qkv,
    rows,
    columns,
    out,
    sums,
    tokens,
    height,
    scale,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of queries over all rows of keys, with a running maximum (Dao, FlashAttention-2, 2307.08691)."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    group = tl.program_id(1)
    exists = query < tokens
    key = tl.arange(0, KEYS)
    STEP: tl.constexpr = 3 * HEADS * DEPTH
    base = head_of(qkv, group, tokens, HEADS, DEPTH, 3)
    line = group.to(tl.int64) * tokens + query
    q = load_rows(base, query, exists, STEP, DEPTH, CHANNELS)
    along_width = tl.load(
        columns + line[:, None] * KEYS + key[None, :], mask=exists[:, None], other=0.0
    ).to(tl.float32)
    along_height = rows + group.to(tl.int64) * height * tokens + query
    largest = tl.full((QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((QUERIES,), tl.float32)
    mixed = tl.zeros((QUERIES, CHANNELS), tl.float32)
    for row in range(height):
        at = row * WIDTH + key
        k = load_rows(base + HEADS * DEPTH, at, key < WIDTH, STEP, DEPTH, CHANNELS)
        shift = tl.load(along_height + row * tokens, mask=exists, other=0.0).to(tl.float32)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E) + along_width
        new = tl.maximum(largest, tl.max(x, 1) + shift)
        p = tl.math.exp2(x - (new - shift)[:, None])
        decay = tl.math.exp2(largest - new)
        total = total * decay + tl.sum(p, 1)
        v = load_rows(base + 2 * HEADS * DEPTH, at, key < WIDTH, STEP, DEPTH, CHANNELS)
        mixed = tl.dot(p.to(v.dtype), v, mixed * decay[:, None], input_precision="ieee")
        largest = new
    to = head_of(out, group, tokens, HEADS, DEPTH, 1)
    store_rows(to, query, exists, mixed / total[:, None], HEADS * DEPTH, DEPTH, CHANNELS)
    tl.store(sums + line, largest + tl.math.log2(total), mask=exists)


@triton.jit
def backward_queries_kernel(
    qkv,
    rows,
    columns,
    out,
    gradient,
    sums,
    delta,
    dqkv,
    logits_rows,
    logits_columns,
    tokens,
    height,
    scale,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A block of queries over all rows of keys: its gradient, those of its positions, and `delta` for the keys' turn."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    group = tl.program_id(1)
    exists = query < tokens
    key = tl.arange(0, KEYS)
    STEP: tl.constexpr = 3 * HEADS * DEPTH
    base = head_of(qkv, group, tokens, HEADS, DEPTH, 3)
    line = group.to(tl.int64) * tokens + query
    o = load_rows(
        head_of(out, group, tokens, HEADS, DEPTH, 1), query, exists, HEADS * DEPTH, DEPTH, CHANNELS
    )
    do = load_rows(
        head_of(gradient, group, tokens, HEADS, DEPTH, 1),
        query,
        exists,
        HEADS * DEPTH,
        DEPTH,
        CHANNELS,
    )
    product = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(delta + line, product, mask=exists)
    q = load_rows(base, query, exists, STEP, DEPTH, CHANNELS)
    tile = line[:, None] * KEYS + key[None, :]
    along_width = tl.load(columns + tile, mask=exists[:, None], other=0.0).to(tl.float32)
    along_height = group.to(tl.int64) * height * tokens + query
    largest = tl.load(sums + line, mask=exists, other=0.0)
    dq = tl.zeros((QUERIES, CHANNELS), tl.float32)
    d_width = tl.zeros((QUERIES, KEYS), tl.float32)
    for row in range(height):
        at = row * WIDTH + key
        k = load_rows(base + HEADS * DEPTH, at, key < WIDTH, STEP, DEPTH, CHANNELS)
        v = load_rows(base + 2 * HEADS * DEPTH, at, key < WIDTH, STEP, DEPTH, CHANNELS)
        shift = tl.load(rows + along_height + row * tokens, mask=exists, other=0.0).to(tl.float32)
        x = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * LOG2E)
        p = tl.math.exp2(x + (along_width + (shift - largest)[:, None]))
        ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee") - product[:, None])
        d_width += ds
        d_height = tl.sum(ds, 1).to(logits_rows.dtype.element_ty)
        tl.store(logits_rows + along_height + row * tokens, d_height, mask=exists)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    to = head_of(dqkv, group, tokens, HEADS, DEPTH, 3)
    store_rows(to, query, exists, dq * scale, STEP, DEPTH, CHANNELS)
    tl.store(
        logits_columns + tile, d_width.to(logits_columns.dtype.element_ty), mask=exists[:, None]
    )


@triton.jit
def backward_keys_kernel(
    qkv,
    rows,
    columns,
    gradient,
    sums,
    delta,
    dqkv,
    tokens,
    height,
    scale,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    DEPTH: tl.constexpr,
    CHANNELS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """A row of keys over all blocks of queries. Logits are transposed, so that they multiply from registers."""
    row = tl.program_id(0)
    group = tl.program_id(1)
    key = tl.arange(0, KEYS)
    STEP: tl.constexpr = 3 * HEADS * DEPTH
    base = head_of(qkv, group, tokens, HEADS, DEPTH, 3)
    given = head_of(gradient, group, tokens, HEADS, DEPTH, 1)
    at = row * WIDTH + key
    k = load_rows(base + HEADS * DEPTH, at, key < WIDTH, STEP, DEPTH, CHANNELS)
    v = load_rows(base + 2 * HEADS * DEPTH, at, key < WIDTH, STEP, DEPTH, CHANNELS)
    dk = tl.zeros((KEYS, CHANNELS), tl.float32)
    dv = tl.zeros((KEYS, CHANNELS), tl.float32)
    line = group.to(tl.int64) * tokens
    along_width = columns + line * KEYS + key[:, None]
    along_height = rows + (group.to(tl.int64) * height + row) * tokens
    for start in range(0, tokens, QUERIES):
        query = start + tl.arange(0, QUERIES)
        exists = query < tokens
        q = load_rows(base, query, exists, STEP, DEPTH, CHANNELS)
        do = load_rows(given, query, exists, HEADS * DEPTH, DEPTH, CHANNELS)
        bias = tl.load(along_width + query[None, :] * KEYS, mask=exists[None, :], other=0.0)
        shift = tl.load(along_height + query, mask=exists, other=0.0).to(tl.float32)
        shift -= tl.load(sums + line + query, mask=exists, other=0.0)
        product = tl.load(delta + line + query, mask=exists, other=0.0)
        x = tl.dot(k, tl.trans(q), input_precision="ieee") * (scale * LOG2E)
        p = tl.math.exp2(x + (bias.to(tl.float32) + shift[None, :]))
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        ds = p * (tl.dot(v, tl.trans(do), input_precision="ieee") - product[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    to = head_of(dqkv, group, tokens, HEADS, DEPTH, 3)
    store_rows(to + HEADS * DEPTH, at, key < WIDTH, dk * scale, STEP, DEPTH, CHANNELS)
    store_rows(to + 2 * HEADS * DEPTH, at, key < WIDTH, dv, STEP, DEPTH, CHANNELS)
