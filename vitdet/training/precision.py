"""In which numbers a training computes: bf16, fp16 or fp32, and how exactly a GPU multiplies the latter.

fp16, with which the published ViTDet was trained, is for GPUs without bf16: its gradients need a scale that follows
them (`vitdet.training.step`), bf16's do not.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vitdet import distributed

log = logging.getLogger(__name__)


def chosen(precision: str, device: torch.device) -> str:
    """'bf16', 'fp16' or 'fp32': as told, or with 'auto' bf16 where the processor has instructions for it, fp16 on any
    other GPU, and fp32 on any other CPU.
    """
    if precision != "auto":
        return precision
    if device.type != "cuda":
        return "bf16" if torch.cpu._is_avx512_bf16_supported() else "fp32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return "bf16"
    if distributed.rank() == 0:
        log.info(
            "this GPU has no instructions for bf16 (those from Ampere on have): training in fp16"
        )
    return "fp16"


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Within it the forward pass computes in this precision."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    return torch.autocast(device.type, dtype, enabled=precision != "fp32")


@contextmanager
def tf32(precision: str, device: torch.device) -> Iterator[None]:
    """Within it a GPU multiplies fp32 matrices as TF32 (10 bits of fraction, 8 times as fast) if that is the precision.

    This is the only place that says so: evaluation and comparisons with published figures stand outside and multiply
    matrices exactly. Convolutions are TF32 everywhere, by torch's own choice.
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
