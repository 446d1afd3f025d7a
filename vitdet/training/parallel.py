"""What turns the single-device detector into one of several processes. The model does not know of it."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vitdet import distributed


def parallelize(detector: nn.Module, device: torch.device) -> nn.Module:
    """The detector, wrapped to average gradients if there are several processes; save the bare one, not the result."""
    if distributed.world_size() == 1:
        return detector
    devices = [device.index] if device.type == "cuda" else None
    known = inspect.signature(DistributedDataParallel).parameters
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its name until 2.14
    return DistributedDataParallel(detector, device_ids=devices, gradient_as_bucket_view=True, **{buffers: False})
