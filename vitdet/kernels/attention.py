"""Multi-head attention with decomposed relative positions, on a grid of tokens or in windows of it.

PyTorch's fused kernels accept positions only as an N x N bias or as queries and keys widened to d +
H + W. Those of `attention_kernels` read the position tables: with 64 x 64 tokens, 12 heads of 64
and 8 images the forward pass takes 1.22 ms and the backward pass 4.3 ms, in windows of 14 0.24 and
0.93 ms (H200, bf16; `python -m tests.bench.attention`). Relative positions: Li et al., MViTv2
(2112.01526).

Letters: B images, H x W tokens, N = H W, h heads, d channels of a head, s = d^-1/2, K tokens along
an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST_DEPTH = 128  # channels of a head whose tiles fit into registers
LARGEST_SIDE = 128  # tokens of a grid's row, which is a tile of keys
LARGEST_WINDOW = 32


def fits(width: int, window: int, depth: int) -> bool:
    """Return whether the kernels support this many tokens per row, window side (0: none) and head
    depth.
    """
    side = window <= LARGEST_WINDOW if window else width <= LARGEST_SIDE
    return side and depth <= LARGEST_DEPTH and depth % 8 == 0


def attention(
    qkv: Tensor,
    bias: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    height: int,
    width: int,
    heads: int,
    window: int,
    scaled: bool,
) -> Tensor:
    """softmax(s q.k + q.Rh[qh - kh] + q.Rw[qw - kw]) v of every head: (B, N, 3 h d) -> (B, N, h d).

    Args:
        qkv: (B, N, 3 h d), queries, keys and values.
        bias: (3 h d), of the projection. Windows may exceed the grid: tokens beyond it are zeros
            before the projection, i.e. the bias after it. rel_h, rel_w: (2 K - 1, d) each, K the
        window, or height or width. Row r is for queries r - K + 1
            tokens after the key. May have another dtype than qkv.
        window: side of the windows in tokens; 0: attention among all tokens.
        scaled: apply the tables to the scaled query.

    Raises:
        ValueError: tables of other lengths, sizes that the kernels do not support.
    """
    depth = qkv.shape[-1] // (3 * heads)
    if not fits(width, window, depth):
        raise ValueError(
            f"attention kernels take heads of up to {LARGEST_DEPTH} channels, a multiple of 8, "
            f"rows of up to {LARGEST_SIDE} tokens and windows of up to {LARGEST_WINDOW}, got "
            f"{depth}, {width} and {window}"
        )
    for table, size in ((rel_h, window or height), (rel_w, window or width)):
        if table.shape != (2 * size - 1, depth):
            raise ValueError(
                f"a table of relative positions must be {(2 * size - 1, depth)}, got "
                f"{tuple(table.shape)}"
            )
    return _attention(qkv, bias, rel_h, rel_w, [height, width, heads, window, int(scaled)])[0]


def reference(
    qkv: Tensor,
    bias: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    *,
    height: int,
    width: int,
    heads: int,
    window: int,
    scaled: bool,
) -> Tensor:
    """`attention` in plain torch, in the dtype of the arguments, with all N x N logits in
    memory.
    """
    rows, columns = window or height, window or width
    x = qkv.unflatten(1, (height, width))
    down, right = -height % rows, -width % columns
    inside = F.pad(x.new_ones(1, height, width, 1, dtype=torch.bool), (0, 0, 0, right, 0, down))
    x = torch.where(inside, F.pad(x, (0, 0, 0, right, 0, down)), bias)
    # (B, windows down, rows, windows across, columns, 3, h, d) -> three times (B, windows, h,
    # tokens, d)
    x = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).unflatten(-1, (3, heads, -1))
    q, k, v = x.permute(5, 0, 1, 3, 6, 2, 4, 7).flatten(5, 6).flatten(2, 3)
    scale = q.shape[-1] ** -0.5
    at_row = torch.arange(rows * columns, device=q.device) // columns
    at_column = torch.arange(rows * columns, device=q.device) % columns
    along_h = rel_h[at_row[:, None] - torch.arange(rows, device=q.device) + rows - 1]
    along_w = rel_w[at_column[:, None] - torch.arange(columns, device=q.device) + columns - 1]
    p = q * scale if scaled else q
    by_row = torch.einsum("bwhnd,nkd->bwhnk", p, along_h)
    by_column = torch.einsum("bwhnd,nkd->bwhnk", p, along_w)
    logits = (q * scale) @ k.transpose(-1, -2) + by_row[..., at_row] + by_column[..., at_column]
    y = logits.softmax(dim=-1) @ v
    y = y.unflatten(3, (rows, columns)).unflatten(1, (-1, (width + right) // columns))
    y = y.permute(0, 1, 4, 2, 5, 3, 6).flatten(5).flatten(3, 4).flatten(1, 2)
    return y[:, :height, :width].flatten(1, 2)


@torch.library.custom_op("vitdet::attention", mutates_args=())
def _attention(
    qkv: Tensor, bias: Tensor, rel_h: Tensor, rel_w: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """`attention`, and the base-2 logarithms of the softmax's sums, for the backward pass.

    sizes: height, width, heads, window, scaled.
    """
    from vitdet.kernels.attention_kernels import forward

    with torch.cuda.device_of(qkv):
        return forward(*_arguments(qkv, bias, rel_h, rel_w, sizes))


@_attention.register_fake
def _(
    qkv: Tensor, _: Tensor, __: Tensor, ___: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    (batch, tokens, channels), (height, width, heads, window, _scaled) = qkv.shape, sizes
    groups, area = batch * heads, tokens
    if window:
        groups, area = groups * -(-height // window) * -(-width // window), window * window
    sums = qkv.new_empty(groups, area, dtype=torch.float32)
    return qkv.new_empty(batch, tokens, channels // 3), sums


@torch.library.custom_op("vitdet::attention_backward", mutates_args=())
def _attention_backward(
    gradient: Tensor,
    qkv: Tensor,
    bias: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    out: Tensor,
    sums: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of qkv, bias and both tables; the last three in float32."""
    from vitdet.kernels.attention_kernels import backward

    given = _arguments(qkv, bias, rel_h, rel_w, sizes)
    with torch.cuda.device_of(qkv):
        return backward(gradient.contiguous(), out, sums, *given)


@_attention_backward.register_fake
def _(_: Tensor, qkv: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dbias, drel_h, drel_w = (one.new_empty(one.shape, dtype=torch.float32) for one in given[:3])
    return dqkv, dbias, drel_h, drel_w


def _arguments(
    qkv: Tensor, bias: Tensor, rel_h: Tensor, rel_w: Tensor, sizes: Sequence[int]
) -> tuple[Any, ...]:
    """Return the first arguments of the launches in `attention_kernels`."""
    from vitdet.kernels.attention_positions import Layout

    height, width, heads, window, scaled = sizes
    layout = Layout(height, width, heads, qkv.shape[-1] // (3 * heads), window)
    tables = rel_h.contiguous(), rel_w.contiguous()
    factor = layout.depth**-0.5 if scaled else 1.0
    return layout, qkv.contiguous(), bias.to(qkv.dtype).contiguous(), tables, factor


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.sizes = inputs[4]
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    if gradient is None:
        return (None,) * 5
    tensors = ctx.saved_tensors
    found = _attention_backward(gradient, *tensors, ctx.sizes)
    return *(one.to(given.dtype) for one, given in zip(found, tensors[:4], strict=True)), None


_attention.register_autograd(_differentiate, setup_context=_save)
