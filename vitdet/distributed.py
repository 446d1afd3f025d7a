"""Several processes: start, stop, who am I, means and objects over all. One process is the same with nobody else.

The environment that torchrun sets decides; this is the only place that reads it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

T = TypeVar("T")
# what all wait for one: it may look at a million files, or compare LVIS's detections
PATIENCE = timedelta(minutes=30)


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Joins the processes that torchrun started, if it did, and gives the device of this one."""
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if cuda
        else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    # gloo beside NCCL carries what lies in the host's memory: results of LVIS are gigabytes, too many for a GPU's
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    dist.init_process_group(backend, timeout=PATIENCE, device_id=device if cuda else None)
    yield device
    # Not after an error: NCCL would wait here for processes that wait for this one, and the error were never told.
    dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 the first; known from before the processes join until after they part."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def mean(values: Tensor) -> Tensor:
    """The mean of a tensor over all processes, in every one of them."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrites the tensors of all processes with those of the first one."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether a flag is set in any of the processes."""
    if world_size() == 1:
        return flag
    return bool(mean(torch.tensor(float(flag), device=device)) > 0)


def gather_objects(value: T) -> list[T]:
    """Every process's object, by rank, in the first process; an empty list in the others."""
    if world_size() == 1:
        return [value]
    gathered: list | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return gathered or []


def all_gather_objects(value: T) -> list[T]:
    """Every process's object, by rank, in every process."""
    if world_size() == 1:
        return [value]
    gathered: list = [None] * world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def together(make: Callable[[], T]) -> T:
    """Run `make` on every rank; if it raises on any rank, raise the first error on all ranks to avoid a deadlock.

    This covers the errors that a user can fix: OSError, ValueError and LookupError.
    """
    results: list[T] = []
    failure: Exception | None = None
    try:
        results.append(make())
    except (OSError, ValueError, LookupError) as error:
        failure = error
    for one in all_gather_objects(failure):
        if one is not None:
            raise one
    return results[0]


def from_first(make: Callable[[], T]) -> T:
    """Run `make` on rank 0 and return its result on every rank; an error on rank 0 is raised on all ranks."""
    return all_gather_objects(together(lambda: [make()] if rank() == 0 else []))[0][0]


def barrier() -> None:
    """Waits until all processes have come here."""
    if world_size() > 1:
        dist.barrier()
