"""Data loaders for training and validation."""

from __future__ import annotations

import ctypes
import gc
import logging
import multiprocessing
import os
import resource
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from vitdet.config import DataConfig
from vitdet.data.annotations import NO_OUTLINE
from vitdet.data.coco import CocoSplit
from vitdet.data.dataset import TrainData, ValData, read_split
from vitdet.data.images import Reading
from vitdet.data.layout import split_files
from vitdet.data.samplers import StepSampler
from vitdet.types import Batch

log = logging.getLogger(__name__)

OPEN_FILES = 1 << 16  # the usual 1,024 is too low: each tensor from a worker is an open file
KEPT_BYTES = 31 << 20  # just below the maximum of glibc's dynamic mmap threshold


def configure_process() -> None:
    """Set process-wide options for loading with workers; called by training and evaluation.

    Raises the soft limit on open files to 65,536 (or to the hard limit, if lower) and makes
    multiprocessing's fork server, if used, import torch once instead of in each worker. Also makes
    glibc reuse freed memory (see `_keep_memory`).
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    multiprocessing.set_forkserver_preload(["__main__", __name__])
    _keep_memory()


def as_it_is(batch: Batch) -> Batch:
    """Return the batch unchanged; `collate_fn` of data sets that already yield batches."""
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
    accumulate: int = 1,
) -> DataLoader:
    """Create a loader of this rank's batches for steps start_step..steps-1.

    `batch_size` is the total over all ranks. `split` is the training split, if it was already read.
    The loader yields `accumulate` separate micro-batches per step (see `StepSampler`). Raises
    the errors of `read_split` (only rank 0 checks the files), and ValueError if batch_size is not
    divisible by world_size * accumulate. Iteration raises ValueError for unusable image files.
    """
    dataset = TrainData(
        split or read_split(data, data.train_split, check_files=rank == 0), data, seed
    )
    if rank == 0:
        path, found = split_files(data, data.train_split)[0], dataset.split
        _warn(path, "objects ignored in training", found.dropped)
        # a data set in which no object has an outline needs no warning
        if found.outlines or found.unmasked.keys() - {NO_OUTLINE}:
            _warn(path, "objects used for box and class only", found.unmasked)
        if dataset.without_objects:
            done = "used as background" if data.keep_empty else "ignored"
            log.info("%s: images without objects (%s): %d", path, done, dataset.without_objects)
    sampler = StepSampler(batch_size, start_step, steps, rank, world_size, accumulate)
    return DataLoader(dataset, batch_sampler=sampler, **_processes(data.workers))


def _warn(path: Path, what: str, causes: Mapping[str, int]) -> None:
    if causes:
        counts = ", ".join(f"{count} {cause}" for cause, count in sorted(causes.items()))
        log.warning("%s: %s: %s", path, what, counts)


def val_loader(
    data: DataConfig,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    split: CocoSplit | None = None,
) -> DataLoader:
    """Create a loader of this rank's part of the validation images, in order of image id.

    Includes images without objects. The concatenated parts of all ranks contain each image once.
    `split` is the validation split, if it was already read. Raises the errors of `read_split`.
    Iteration raises ValueError for unusable image files.
    """
    records = (split or read_split(data, data.val_split)).records
    part = records[len(records) * rank // world_size : len(records) * (rank + 1) // world_size]
    return DataLoader(
        ValData(part, data.image_size, data.antialias, Reading.of(data)),
        batch_size=batch_size,
        **_processes(data.workers),
    )


def _keep_memory() -> None:
    """Make glibc reuse freed memory; returning it to the kernel takes a fifth of the loading time.

    glibc raises its mmap threshold when a large allocation is freed. Here, a large array is
    allocated and freed; its pages are never touched, so that the array occupies no memory.
    """
    np.empty(KEPT_BYTES, np.uint8)


def release_memory() -> None:
    """Make glibc return freed memory to the kernel (see `_keep_memory`).

    Called after an evaluation: training cannot reuse the freed blocks, since these are scattered
    among blocks in use.
    """
    with suppress(OSError, AttributeError):  # a C library other than glibc
        ctypes.CDLL(None).malloc_trim(0)


def _processes(workers: int) -> dict:
    return {
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "collate_fn": as_it_is,
        "pin_memory": torch.cuda.is_available(),
        "worker_init_fn": _start_worker,
    }


def _start_worker(worker: int) -> None:
    """Set up a worker process.

    The worker leaves the process group of the parent process, so that a signal to the group does
    not end the worker before training stops; the parent process ends its workers itself. The
    garbage collector ignores objects of the parent process, to avoid copies of their memory.
    """
    os.setpgrp()
    gc.freeze()
    _keep_memory()  # workers do not inherit this setting from a fork server
