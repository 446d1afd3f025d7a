"""Multi-head attention with decomposed relative positions, on a grid of tokens or in its windows.

PyTorch's fused kernels accept positions only as an N x N bias or as queries and keys widened to d +
H + W channels. The kernels in `attention_kernels` read the position tables directly. With 64 x 64
tokens, 12 heads of 64 channels and 8 images, the forward pass takes 1.22 ms and the backward pass
4.3 ms; with windows of 14 x 14 tokens, they take 0.24 and 0.93 ms (H200, bf16; `python -m
tests.bench.attention`). Relative positions: Li et al., MViTv2 (arXiv:2112.01526).

Notation: B images, H x W tokens, N = H W, h heads, d channels per head, s = d^-1/2, K tokens along
an axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST_DEPTH = 128  # maximum number of channels per head: a tile must fit into registers
LARGEST_SIDE = 128  # maximum grid width with global attention: a row is a tile of keys
LARGEST_WINDOW = 32  # maximum number of tokens per side of a window


def fits(width: int, window: int, depth: int) -> bool:
    """Return whether the kernels support grid width, window (0: global) and channels per head."""
    side = window <= LARGEST_WINDOW if window else width <= LARGEST_SIDE
    return side and depth <= LARGEST_DEPTH and depth % 8 == 0


@torch.library.custom_op("vitdet::attention", mutates_args=())
def attention(
    qkv: Tensor, bias: Tensor, rel_h: Tensor, rel_w: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Compute softmax(s q.k + q.Rh[qh - kh] + q.Rw[qw - kw]) v for every head.

    Args:
        qkv: (B, N, 3 h d), queries, keys and values, of sizes that `fits` accepts.
        bias: (3 h d), bias of the projection. Windows may extend beyond the grid: tokens there are
            zeros before the projection, and therefore equal the bias after it.
        rel_h, rel_w: (2 K - 1, d) each; K is the window's side, or the grid's height or width. Row
            r contains Rh[r - K + 1] or Rw[r - K + 1]. The dtype may differ from the dtype of qkv.
        sizes: height and width of the grid, number of heads, side of the windows in tokens (0:
            attention over all tokens), and 1 if the tables apply to the scaled query, else 0.

    Returns:
        The heads' output (B, N, h d), and log2 of the softmax denominators for the backward pass.
    """
    from vitdet.kernels.attention_kernels import forward

    with torch.cuda.device_of(qkv):
        return forward(*_prepared(qkv, bias, rel_h, rel_w, sizes))


@attention.register_fake
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
def attention_backward(
    gradient: Tensor,
    qkv: Tensor,
    bias: Tensor,
    rel_h: Tensor,
    rel_w: Tensor,
    out: Tensor,
    sums: Tensor,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of qkv and, in float32, of bias and both tables."""
    from vitdet.kernels.attention_kernels import backward

    given = _prepared(qkv, bias, rel_h, rel_w, sizes)
    with torch.cuda.device_of(qkv):
        return backward(gradient.contiguous(), out, sums, *given)


@attention_backward.register_fake
def _(_: Tensor, qkv: Tensor, *given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    dbias, drel_h, drel_w = (x.new_empty(x.shape, dtype=torch.float32) for x in given[:3])
    return dqkv, dbias, drel_h, drel_w


def _prepared(
    qkv: Tensor, bias: Tensor, rel_h: Tensor, rel_w: Tensor, sizes: Sequence[int]
) -> tuple[Any, ...]:
    """Return the arguments common to `forward` and `backward` in `attention_kernels`."""
    from vitdet.kernels.attention_positions import Layout

    height, width, heads, window, scaled = sizes
    layout = Layout.of(height, width, heads, qkv.shape[-1] // (3 * heads), window)
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
    found = attention_backward(gradient, *tensors, ctx.sizes)
    return *(grad.to(x.dtype) for grad, x in zip(found, tensors[:4], strict=True)), None


attention.register_autograd(_differentiate, setup_context=_save)
