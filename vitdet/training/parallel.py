"""What turns the single-device detector into one of several processes. The model does not know of it."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vitdet import distributed


def parallelize(detector: nn.Module, device: torch.device) -> nn.Module:
    """The detector, wrapped to average gradients if there are several processes; save the bare one, not the result."""
    if distributed.world_size() == 1:
        return detector
    devices = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(detector, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True)
