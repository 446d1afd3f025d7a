"""Layers, initializers and numeric helpers for the modules of the detector.

Notation: B images, C channels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-6  # epsilon of LayerNorms in ViT and ViTAE, and between the pyramid's deconvolutions


class LayerNorm(nn.LayerNorm):
    """LayerNorm in the precision of its weights, as torch.autocast computes it on a GPU.

    On a CPU, autocast leaves inputs in bf16, and PyTorch then adds up the gradients of weight and
    bias in bf16, where a sum over many positions stops growing.
    """

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class LayerNorm2d(LayerNorm):
    """LayerNorm over the channels of a map: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNorm(nn.Module):
    """Convolution without bias, then LayerNorm over the channels: (B, C, H, W) -> (B, C', H, W).

    Without `norm`, the layer is only a convolution with bias.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, *, norm: bool, eps: float
    ) -> None:
        super().__init__()
        size, padding = kernel_size, kernel_size // 2
        self.conv = nn.Conv2d(in_channels, out_channels, size, padding=padding, bias=not norm)
        self.norm = LayerNorm2d(out_channels, eps=eps) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Deconv2x2(nn.ConvTranspose2d):
    """Transposed convolution with kernel 2 and stride 2: (B, C, H, W) -> (B, C', 2H, 2W).

    The output windows do not overlap, so that a linear layer per input pixel computes the result,
    several times faster on a CPU than the general transposed convolution.
    """

    bias: Tensor

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # no output_size
        weight = rearrange(self.weight, "c out i j -> (i j out) c")
        pixels = F.linear(x.permute(0, 2, 3, 1), weight, self.bias.repeat(4))
        # keep the channels last in memory, as in token tensors
        pixels = rearrange(pixels, "b h w (i j out) -> b (h i) (w j) out", i=2, j=2)
        return pixels.permute(0, 3, 1, 2)


class Blocks(nn.ModuleList):
    """The blocks of a backbone in sequence: (B, H, W, C) -> (B, H, W, C).

    With `checkpointing` (off by default), only the blocks' inputs are stored, and the backward pass
    recomputes each block with the same random numbers. This saves memory and costs time.
    """

    checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.checkpointing and torch.is_grad_enabled():
                contexts = partial(_contexts, block)
                x = checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            else:
                x = block(x)
        return x


class DropPath(nn.Module):
    """In training, drop an image's residual path with probability `rate`, and scale kept paths.

    The scale is 1 / (1 - rate). Huang et al., stochastic depth (arXiv:1603.09382). `keep` is a
    tensor: with a number, as in timm, torch.compile would compile each block separately.
    """

    keep: Tensor

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate, self.drops = rate, rate > 0
        self.register_buffer("keep", torch.tensor(1 - rate), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Drop each image's path independently: (B, ...) -> (B, ...)."""
        if not self.training or not self.drops:
            return x
        kept = torch.rand(len(x), *[1] * (x.dim() - 1), device=x.device) < self.keep
        return x * (kept / self.keep).to(x.dtype)


def _contexts(block: nn.Module) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Return the context managers of a block's forward pass and of its recomputation."""
    return nullcontext(), _other_statistics(block)


@contextmanager
def _other_statistics(block: nn.Module) -> Iterator[None]:
    """Let BatchNorm update copies of its buffers: the forward pass already updated the buffers."""
    statistics = [
        (module, name, buffer)
        for module in block.modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm)
        for name, buffer in module.named_buffers(recurse=False)
    ]
    for norm, name, buffer in statistics:
        setattr(norm, name, buffer.clone())
    try:
        yield
    finally:
        for norm, name, buffer in statistics:
            setattr(norm, name, buffer)


def init_conv(module: nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Set Kaiming-normal weights (fan out) and zero biases (Detectron2: c2_msra_fill)."""
    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def init_linear(module: nn.Linear) -> None:
    """Set uniform weights of variance 1 / inputs and zero biases (Detectron2: c2_xavier_fill)."""
    nn.init.kaiming_uniform_(module.weight, a=1)
    nn.init.zeros_(module.bias)


def init_predictor(module: nn.Linear | nn.Conv2d, std: float) -> None:
    """Set normally distributed weights of standard deviation `std` and zero biases."""
    nn.init.normal_(module.weight, std=std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; float32 and float64 are returned unchanged."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    """Return x unchanged, but multiply its gradient by `scale`."""
    return _ScaledGradient.apply(x, scale)


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
