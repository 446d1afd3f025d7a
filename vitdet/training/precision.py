"""Precision of training: bf16, fp16 or fp32, and TF32 on GPUs.

fp16, with which the published ViTDet was trained, is for GPUs without bf16; it needs a gradient
scaler (`vitdet.training.step`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitdet import distributed

log = logging.getLogger(__name__)


def chosen(precision: str, device: torch.device) -> str:
    """Resolve a precision setting on this device: 'bf16', 'fp16' or 'fp32'.

    'auto' is bf16 if the device supports it natively, else fp16 on a GPU and fp32 on a CPU.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    if distributed.rank() == 0:
        log.info("this GPU does not support bf16 (Ampere and later do): using fp16")
    return "fp16"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Return the autocast context of the forward pass."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


@contextmanager
def tf32(precision: str, device: torch.device) -> Iterator[None]:
    """Use TF32 for matrix products on a GPU within the context, if the precision is fp32.

    TF32 has a 10-bit mantissa and is faster than fp32. Evaluations run outside the context.
    Convolutions use TF32 inside and outside the context, which is torch's default.
    """
    if device.type != "cuda" or precision != "fp32":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
