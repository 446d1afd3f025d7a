"""What turns the single-device detector into one of several processes. The model does not know of it.

BatchNorm (in ViTAE) takes its statistics over the images of all processes on GPUs, as the published ViTAE-B run did.
On CPUs torch has no such thing: each process uses its own images, and the running statistics that count, in checkpoints
and evaluations, are the first process's.
"""

from __future__ import annotations

import inspect
import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from vitdet import distributed
from vitdet.training.optim import running_statistics

log = logging.getLogger(__name__)


def parallelize(detector: nn.Module, device: torch.device, accumulate: int = 1) -> nn.Module:
    """The detector, wrapped to average gradients if there are several processes; save the bare one, not the result.

    Its BatchNorms become synchronised ones, in place and with the same names, where that is possible. accumulate: the
    micro-batches of a step.
    """
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in detector.modules())
    if has_norms and accumulate > 1 and distributed.rank() == 0:
        log.warning(
            "BatchNorm sees the images of one micro-batch only: train.accumulate=%d trains another model than as "
            "many more processes would",
            accumulate,
        )
    if distributed.world_size() == 1:
        return detector
    if has_norms:
        if device.type == "cuda":
            detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
        elif distributed.rank() == 0:
            log.warning(
                "without GPUs BatchNorm sees the images of its own process only: %d processes train another "
                "model than one does",
                distributed.world_size(),
            )
    known = inspect.signature(DistributedDataParallel).parameters
    # torch 2.15 renamed broadcast_buffers
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {
        "device_ids": [device.index] if device.type == "cuda" else None,
        "gradient_as_bucket_view": True,
        buffers: False,
    }
    return DistributedDataParallel(detector, **options)


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Within it the gradients of a model of `parallelize` stay those of this process; forward and backward belong inside."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return nullcontext()


def share_statistics(detector: nn.Module) -> None:
    """Gives all processes the first one's running statistics, with which each then evaluates its share."""
    distributed.broadcast(running_statistics(detector).values())
