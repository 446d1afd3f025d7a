"""Batches of the training stream and of the validation images, by data-loader processes."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import resource
from collections.abc import Iterator
from itertools import islice

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from vitdet.config import DataConfig
from vitdet.data.coco import CocoSplit
from vitdet.data.dataset import TrainData, ValData, read_split
from vitdet.data.layout import split_files
from vitdet.data.samplers import positions
from vitdet.types import Batch

log = logging.getLogger(__name__)

OPEN_FILES = 1 << 16  # each tensor of a batch from a worker is an open file: 1,024 are too few
KEPT_BYTES = 31 << 20  # just below the largest allocation that glibc adapts its threshold to


def configure_process() -> None:
    """Settings of this process that loading with workers needs; `vitdet.train` and `vitdet.evaluate` call it first.

    Raises the soft limit of open files to 65,536 (or the hard limit); lets multiprocessing's fork server, where it is
    used, import torch once instead of in each worker; and keeps freed memory for the next images (see `_keep_memory`).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    multiprocessing.set_forkserver_preload(["__main__", __name__])
    _keep_memory()


def as_it_is(batch: Batch) -> Batch:
    """What a data loader is to do with a batch."""
    return batch


def train_loader(
    data: DataConfig,
    batch_size: int,
    seed: int,
    start_step: int,
    steps: int,
    rank: int = 0,
    world_size: int = 1,
    split: CocoSplit | None = None,
) -> DataLoader:
    """Batches of this rank for the steps start_step..steps-1; `batch_size` counts the images of all ranks.

    split: the training split, if it was read before. Raises what `read_split` raises (rank 0 alone looks at the
    files), ValueError when the ranks cannot share a batch, and while it is read from ValueError for an image file that
    cannot be used.
    """
    dataset = TrainData(split or read_split(data, data.train_split, look=rank == 0), data, seed)
    dropped = dataset.split.dropped
    if dropped and rank == 0:
        counts = ", ".join(f"{count} {reason}" for reason, count in sorted(dropped.items()))
        log.warning(
            "%s: objects left out of training: %s", split_files(data, data.train_split)[0], counts
        )
    sampler = _Steps(batch_size, start_step, steps, rank, world_size)
    return DataLoader(dataset, batch_sampler=sampler, **_processes(data.workers))


def val_loader(
    data: DataConfig,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    split: CocoSplit | None = None,
) -> DataLoader:
    """Batches of this rank's part of the validation images, also those without objects, in order of image id.

    The ranks' parts, one after the other, are all images once. split: the validation split, if it was read before.
    Raises what `read_split` raises, and ValueError for an image file that cannot be used.
    """
    records = (split or read_split(data, data.val_split)).records
    part = records[len(records) * rank // world_size : len(records) * (rank + 1) // world_size]
    return DataLoader(
        ValData(part, data.image_size, data.antialias),
        batch_size=batch_size,
        **_processes(data.workers),
    )


class _Steps(Sampler):
    def __init__(
        self, batch_size: int, start_step: int, steps: int, rank: int, world_size: int
    ) -> None:
        self.count = max(steps - start_step, 0)
        self.arguments = (start_step, batch_size, rank, world_size)
        positions(*self.arguments)  # complains here, not in the loop

    def __iter__(self) -> Iterator[list[int]]:
        return islice(positions(*self.arguments), self.count)

    def __len__(self) -> int:
        return self.count


def _keep_memory() -> None:
    """Makes glibc reuse the memory of images instead of returning it to the kernel, which took a fifth of the time.

    glibc raises its threshold to twice the largest allocation that was freed. This one is never touched, so it costs
    nothing.
    """
    np.empty(KEPT_BYTES, np.uint8)


def _processes(workers: int) -> dict:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "collate_fn": as_it_is,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _start_worker,
    }


def _start_worker(worker: int) -> None:
    """Leaves the process group of the training, which ends its workers itself: a signal to the group must not take the
    next batch away. Keeps the garbage collector from copying the pages of objects that the parent made.
    """
    os.setpgrp()
    gc.freeze()
    _keep_memory()  # not inherited from a fork server
