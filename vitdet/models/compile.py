"""Compilation of a detector's parts with torch.compile, which fuses operations into fewer kernels.

Parts are compiled in place, so that the names of parameters and modules do not change. Parts of
the same class and shape, such as a backbone's blocks, share compiled code.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from einops import rearrange
from torch import nn

from vitdet.models.detector import Detector
from vitdet.models.layers import Blocks


def compile_parts(detector: Detector) -> None:
    """Compile the backbone's blocks, the pyramid and the heads in place.

    Each part is compiled at its first call, for fixed image and batch sizes. Compiled parts draw
    the same random numbers as uncompiled parts.
    """
    torch._inductor.config.fallback_random = True
    # allow one compilation per shape of the levels and heads, in training and in evaluation
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)
    # einops caches tensor types, and a new type would trigger a recompilation
    for tensor in (torch.zeros(1), nn.Parameter(torch.zeros(1)), np.zeros(1)):
        rearrange(tensor, "a -> a")
    for part in parts(detector):
        part.compile(dynamic=False)


def parts(detector: Detector) -> Iterator[nn.Module]:
    """Yield the modules to compile."""
    for module in detector.backbone.modules():
        if isinstance(module, Blocks):
            yield from module
    yield detector.pyramid
    yield detector.rpn
    yield from detector.roi_heads.stages
    if detector.roi_heads.mask is not None:
        yield detector.roi_heads.mask
