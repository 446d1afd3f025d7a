"""Distributed data parallel training.

On GPUs, BatchNorm (in ViTAE) computes statistics over the images of all processes, as in the
published ViTAE-B run. torch has no synchronized BatchNorm for CPUs: each process uses only its own
images. Checkpoints and evaluations use the running statistics of rank 0.
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
    """Wrap the detector so that the backward pass averages gradients over the processes.

    On GPUs, the detector's BatchNorms are replaced in place by synchronized ones with the same
    names. Checkpoints contain the unwrapped detector. accumulate: micro-batches per step.
    """
    has_norms = any(isinstance(module, nn.BatchNorm2d) for module in detector.modules())
    if has_norms and accumulate > 1 and distributed.rank() == 0:
        log.warning(
            "BatchNorm uses the images of one micro-batch only: train.accumulate=%d is not "
            "equivalent to %d times as many processes",
            accumulate,
            accumulate,
        )
    if distributed.world_size() == 1:
        return detector
    if has_norms:
        if device.type == "cuda":
            detector = nn.SyncBatchNorm.convert_sync_batchnorm(detector)
        elif distributed.rank() == 0:
            log.warning(
                "without GPUs, BatchNorm statistics are per process: results with %d processes "
                "may differ from results with one process",
                distributed.world_size(),
            )
    known = inspect.signature(DistributedDataParallel).parameters
    # torch 2.15 renamed broadcast_buffers
    buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    options: dict[str, Any] = {"gradient_as_bucket_view": True, buffers: False}
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(detector, device_ids=ids, **options)


def without_exchange(model: nn.Module) -> AbstractContextManager[None]:
    """Return a context in which the model's backward pass does not average the gradients."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()


def share_statistics(detector: nn.Module) -> None:
    """Broadcast rank 0's running statistics, so that all ranks evaluate the same model."""
    distributed.broadcast(running_statistics(detector).values())
