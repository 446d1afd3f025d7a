"""RoIAlign over all levels of a pyramid in one launch, forward and backward.

torchvision reads NCHW maps of float32 one point, RoI and channel at a time, and accumulates the
gradient with atomics: 28 ms of a training step of ViT-B at batch 8 on an H100, with the copies for
its layout and precision. Here maps are read channels last in their own precision, as products with
the weights of a separable interpolation (`vitdet.kernels.roi_align_kernels`), while coordinates,
weights and sums are float32. The gradient needs no atomics: it is deterministic, needs no float32
copy of the maps, and is written once.

Errors against float64, relative (L2 norms), of features and gradients: below 1e-6 with float32 maps
of small sides, on larger ones that of coordinates in float32; with 16-bit maps that of rounding the
result (float16: 2e-4).

Letters: B images, R RoIs, C channels, h x w cells of a map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align as torchvision_roi_align

LEVELS = 5  # at most, of the kernels
TYPES = (torch.bfloat16, torch.float16, torch.float32)


def roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    bins: int,
    sampling_ratio: int,
) -> Tensor:
    """Return the features of every RoI, (R, C, bins, bins), channels last in memory: aligned as in
    Detectron2, for CUDA tensors.

    Args:
        features: 1 to 5 maps (B, C, h, w) of bfloat16, float16 or float32 (channels last is
            fastest).
        boxes: (R, 4) xyxy pixels, float32. NaN or infinite coordinates give zeros and no gradient.
        image: (R,) int64 in 0..B-1.
        level: (R,) int64, the map to read; -1: zeros and no gradient.
        strides: of the maps.
        bins: per side.
        sampling_ratio: points per bin and axis; 0: adaptive to the RoI's size, none if it ends
            before it starts.

    Raises:
        ValueError: other numbers of maps, shapes or dtypes.
    """
    features = list(features)
    if not 1 <= len(features) <= LEVELS or len(features) != len(strides):
        raise ValueError(
            f"roi_align takes 1 to {LEVELS} maps and a stride for each, "
            f"got {len(features)} maps and {len(strides)} strides"
        )
    kinds = {one.dtype for one in features}
    if len(kinds) > 1 or not kinds <= set(TYPES):
        raise ValueError(f"maps must be of one type of {TYPES}, got {sorted(map(str, kinds))}")
    if boxes.shape != (len(boxes), 4) or boxes.dtype != torch.float32:
        raise ValueError(f"boxes must be (R, 4) float32, got {tuple(boxes.shape)} {boxes.dtype}")
    return pool(features, boxes, image, level, list(strides), bins, sampling_ratio)


@torch.library.custom_op("vitdet::roi_align", mutates_args=())
def pool(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    bins: int,
    ratio: int,
) -> Tensor:
    """`roi_align` by the Triton kernel."""
    from vitdet.kernels.roi_align_kernels import forward

    maps = [feature.permute(0, 2, 3, 1).contiguous() for feature in features]
    rois = boxes.contiguous(), image.contiguous(), level.contiguous()
    with torch.cuda.device_of(boxes):
        found = forward(maps, *rois, strides, bins, ratio)
    return found.permute(0, 3, 1, 2)


@pool.register_fake
def _(features: Sequence[Tensor], boxes: Tensor, *sizes: Any) -> Tensor:
    bins = sizes[3]
    out = features[0].new_empty(boxes.shape[0], bins, bins, features[0].shape[1])
    return out.permute(0, 3, 1, 2)


@torch.library.custom_op("vitdet::roi_align_backward", mutates_args=())
def pool_backward(
    gradient: Tensor,
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    heights: Sequence[int],
    widths: Sequence[int],
    images: int,
    strides: Sequence[int],
    ratio: int,
) -> list[Tensor]:
    """Return the gradients (B, C, h, w) of the maps, given that of the features (R, C, bins,
    bins).
    """
    from vitdet.kernels.roi_align_kernels import backward

    given = gradient.permute(0, 2, 3, 1).contiguous()
    rois = boxes.contiguous(), image.contiguous(), level.contiguous()
    shapes = list(zip(heights, widths, strict=True))
    with torch.cuda.device_of(boxes):
        found = backward(given, *rois, shapes, images, strides, ratio)
    return [one.permute(0, 3, 1, 2) for one in found]


@pool_backward.register_fake
def _(gradient: Tensor, *given: Any) -> list[Tensor]:
    heights, widths, images = given[3:6]
    return [
        gradient.new_empty(images, height, width, gradient.shape[1]).permute(0, 3, 1, 2)
        for height, width in zip(heights, widths, strict=True)
    ]


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, image, level, strides, _, ratio = inputs
    ctx.save_for_backward(boxes, image, level)
    heights, widths = [one.shape[2] for one in features], [one.shape[3] for one in features]
    ctx.sizes = (heights, widths, features[0].shape[0], strides, ratio)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    return pool_backward(gradient, *ctx.saved_tensors, *ctx.sizes), *[None] * 6


pool.register_autograd(_backward, setup_context=_setup)


def reference(
    features: Sequence[Tensor],
    boxes: Tensor,
    image: Tensor,
    level: Tensor,
    strides: Sequence[int],
    bins: int,
    sampling_ratio: int,
) -> Tensor:
    """`roi_align` for finite boxes, by torchvision in the precision of the maps."""
    rois = torch.cat([image[:, None], boxes], dim=1).to(features[0].dtype)
    found = features[0].new_zeros(len(boxes), features[0].shape[1], bins, bins)
    for number, (feature, stride) in enumerate(zip(features, strides, strict=True)):
        chosen = (level == number).nonzero().flatten()
        pooled = torchvision_roi_align(
            feature, rois[chosen], bins, 1 / stride, sampling_ratio, aligned=True
        )
        found = found.index_put((chosen,), pooled)
    return found
