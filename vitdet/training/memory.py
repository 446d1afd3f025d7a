"""Activation checkpointing: whether the backbone's blocks store or recompute their activations.

`train.activation_checkpointing=auto` estimates a step's memory without checkpointing. The constants
were measured with images of 1024 x 1024 pixels: without the Triton kernels on an H100 (ViT-B, L and
H, batches of 1 to 8 images; the error is at most 15%), and with the kernels on an H200 (ViT-B and
L, batches of 1, 4 and 8 images, as CUDA graphs; the error is at most 5%).

- per weight: 16 bytes for its value, its gradient and AdamW's two moments; 20 with weight averaging
- per output value of a block: 50 bytes in bf16 and fp16 (35 with the kernels), 100 bytes in fp32
- per pixel of the images, for everything else: 1,300 bytes (1,230 with the kernels)

Blocks recompute their activations if the estimate exceeds 90% of the GPU's memory.
"""

from __future__ import annotations

import logging

import torch

from vitdet import distributed, kernels
from vitdet.config import Config
from vitdet.models import Detector
from vitdet.models.layers import Blocks

BYTES_PER_WEIGHT = 16
BYTES_PER_AVERAGED_WEIGHT = 4
BYTES_PER_BLOCK_VALUE = {False: 50, True: 35}  # in bf16 and fp16; key: whether Triton kernels run
BYTES_PER_PIXEL = {False: 1300, True: 1230}
SHARE = 0.9  # share of the GPU's memory; the rest is for CUDA and fragmentation
log = logging.getLogger(__name__)


def checkpoint_activations(
    detector: Detector, config: Config, images: int, precision: str, device: torch.device
) -> None:
    """Turn the blocks' activation checkpointing on or off; images: micro-batch size."""
    setting = config.train.activation_checkpointing
    needed = setting == "blocks"
    if setting == "auto" and device.type == "cuda":
        fused = precision != "fp32" and kernels.enabled(next(detector.parameters()))
        estimate = step_bytes(detector, config, images, precision, fused)
        total = torch.cuda.get_device_properties(device).total_memory
        needed = estimate > SHARE * total
        if needed and distributed.rank() == 0:
            log.info(
                "the backbone's blocks recompute their activations in the backward pass: "
                f"micro-batches of size {images} would need about {estimate / 2**30:.1f} GiB, "
                f"more than {SHARE:.0%} of the GPU's {total / 2**30:.1f} GiB "
                "(train.activation_checkpointing=auto)"
            )
    for module in detector.modules():
        if isinstance(module, Blocks):
            module.checkpointing = needed


def step_bytes(
    detector: Detector, config: Config, images: int, precision: str, fused: bool
) -> float:
    """Estimate the bytes of a step without activation checkpointing; fused: with Triton kernels."""
    backbone, side = detector.backbone, config.data.image_size
    weights = sum(parameter.numel() for parameter in detector.parameters())
    averaged = BYTES_PER_AVERAGED_WEIGHT if config.optim.ema else 0
    if isinstance(backbone.out_channels, int):
        maps = [(backbone.out_channels, backbone.stride)]
    else:
        maps = list(zip(backbone.out_channels, backbone.strides, strict=True))
    stages = [module for module in backbone.modules() if isinstance(module, Blocks)]
    values = sum(
        len(blocks) * channels * (side / stride) ** 2
        for blocks, (channels, stride) in zip(stages, maps, strict=True)
    )
    value_bytes = BYTES_PER_BLOCK_VALUE[fused] * (2 if precision == "fp32" else 1)
    return weights * (BYTES_PER_WEIGHT + averaged) + images * (
        value_bytes * values + BYTES_PER_PIXEL[fused] * side**2
    )
