"""Process groups: setup, teardown, rank, and collectives.

The process group is configured by torchrun's environment variables. Only this module and
`vitdet.torchrun`, which does not import torch, read these variables. Without torchrun, there is one
process and no communication.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from vitdet import torchrun

Store = dist.Store
T = TypeVar("T")
# Timeout of a collective, in which ranks may wait while rank 0 checks files or evaluates on LVIS.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
# Timeout for joining the process group, which happens before any image is read.
JOIN_TIMEOUT = timedelta(minutes=5)
EXCHANGE = 2**26  # approximate bytes of gradients averaged per collective
POLL = 0.1  # seconds between two requests to the store while ranks join

_joined = False  # whether `process_group`, not the caller, initialized torch's process group
_collective = ""  # name of the main thread's current collective, if any
_changed = 0.0  # time.monotonic() when the main thread last entered or left a collective


@contextmanager
def process_group() -> Iterator[torch.device]:
    """Join the process group if torchrun started this process; yield the device of this process."""
    cuda = torch.cuda.is_available()
    device = torch.device("cpu")
    if cuda:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield device
        return
    # when a collective times out, torch's Flight Recorder writes the recent ones to a file
    if "TORCH_NCCL_TRACE_BUFFER_SIZE" not in os.environ:  # older name of TORCH_FR_BUFFER_SIZE
        os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
    # gloo gathers objects in host memory: gigabytes of LVIS results may not fit on a GPU
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    store, this_rank, size = _join()
    # If NCCL and gloo do not connect in time, faulthandler prints the stacks and ends the process.
    faulthandler.dump_traceback_later(JOIN_TIMEOUT.total_seconds(), exit=True, file=2)
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=this_rank,
            world_size=size,
            timeout=COLLECTIVE_TIMEOUT,
            device_id=device if cuda else None,
        )
    finally:
        faulthandler.cancel_dump_traceback_later()
    global _joined
    _joined = True
    yield device
    # After an error, the group is not destroyed: NCCL would wait for ranks that wait for this rank.
    dist.destroy_process_group()
    _joined = False


def _join() -> tuple[dist.Store, int, int]:
    """Wait for all processes; return the store, the rank and the world size.

    Raises TimeoutError if some ranks do not join within JOIN_TIMEOUT, and ConnectionError if
    torchrun has ended or the connection to its store is lost.
    """
    if torchrun.has_ended():
        raise ConnectionError("torchrun on rank 0's node has ended: its store refuses connections")
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    limit = f"within {JOIN_TIMEOUT.total_seconds():g} seconds"
    try:
        store, this_rank, size = next(dist.rendezvous("env://", timeout=JOIN_TIMEOUT))
    except dist.DistError as error:
        raise TimeoutError(
            f"rank {rank()} of {torchrun.world_size()} could not connect to the other ranks at "
            f"{address} {limit}; check that all nodes are up and can reach this address"
        ) from error
    try:
        launch_id, missing = _synchronize_launch(store, this_rank, size)
    except dist.DistError as error:
        raise ConnectionError(
            f"rank {this_rank} of {size} lost the connection to the store at {address} while the "
            "ranks were joining; see the log of rank 0's node"
        ) from error
    if missing:
        who, logs = ("ranks", "their logs") if len(missing) > 1 else ("rank", "its log")
        earlier = "; rank 0 joined an earlier launch and did not start again"
        raise TimeoutError(
            f"{who} {', '.join(map(str, missing))} of {size} did not join {limit}; see {logs}"
            f"{earlier if launch_id and 0 in missing else ''}"
        )
    store = dist.PrefixStore(f"launch {launch_id}", store)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    return store, this_rank, size


def _synchronize_launch(store: dist.Store, this_rank: int, size: int) -> tuple[str, list[int]]:
    """Synchronize all ranks of one launch; return its ID and the ranks that did not join in time.

    torchrun serves one store for all restarts, so the store may contain keys of earlier launches.
    TORCHELASTIC_RESTART_COUNT does not identify a launch, since torchrun counts restarts per node.
    Rank 0 publishes a random launch ID. Every other rank writes a random ID under
    `<launch>/rank <rank>` and proceeds once rank 0 lists that ID in `<launch>/all`, so keys of
    earlier launches are ignored. While rank 0 waits, it increments `<launch>/polls`: if this
    counter does not change, the published launch is an earlier one.
    """
    deadline = time.monotonic() + JOIN_TIMEOUT.total_seconds()
    own_id, launch_id, polls = uuid.uuid4().hex, "", 0
    if this_rank == 0:
        store.set("launch", own_id)
        keys = [f"{own_id}/rank {other}" for other in range(1, size)]
        while keys and not store.check(keys):
            if time.monotonic() > deadline and (missing := _missing(store, own_id, size)):
                return own_id, missing
            store.add(f"{own_id}/polls", 1)
            time.sleep(POLL)
        store.set(f"{own_id}/all", json.dumps([store.get(key).decode() for key in keys]))
        return own_id, []
    while True:
        published = store.get("launch").decode() if store.check(["launch"]) else ""
        if published != launch_id:
            launch_id = published
            store.set(f"{launch_id}/rank {this_rank}", own_id)
            polls = store.add(f"{launch_id}/polls", 0)
        complete = f"{launch_id}/all"
        if launch_id and store.check([complete]) and own_id in json.loads(store.get(complete)):
            return launch_id, []
        if time.monotonic() > deadline:
            break
        time.sleep(POLL)
    if not launch_id:
        return "", [0]
    missing = _missing(store, launch_id, size)
    if store.add(f"{launch_id}/polls", 0) == polls:
        missing = [0, *missing]
    return launch_id, missing or [0]  # rank 0 is missing if all other ranks joined


def _missing(store: dist.Store, launch: str, size: int) -> list[int]:
    """Return the ranks other than 0 that have not joined this launch."""
    return [other for other in range(1, size) if not store.check([f"{launch}/rank {other}"])]


def has_joined() -> bool:
    """Return whether `process_group` has joined a group of several processes."""
    return _joined and world_size() > 1


def connect(prefix: str, limit: timedelta) -> dist.Store:
    """Return a new connection to torchrun's store; all keys start with `prefix`.

    Each operation times out after `limit`. Each thread needs a separate connection, because a
    connection serves only one operation at a time.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=limit)
    return dist.PrefixStore(prefix, store)


def has_shutdown_timeout() -> bool:
    """Return whether this version of torchrun can wait more than 30 s for its processes to end."""
    from torch.distributed.launcher.api import LaunchConfig

    return "shutdown_timeout" in LaunchConfig.__dataclass_fields__


def flight_record() -> str:
    """Return NCCL's record of unfinished collectives as JSON, or an error text; '' without NCCL."""
    if not dist.is_initialized() or "nccl" not in dist.get_backend_config():
        return ""
    try:
        module = importlib.import_module("torch._C._distributed_c10d")
        return bytes(module._dump_nccl_trace_json(onlyActive=True)).decode(errors="replace")
    except (ImportError, AttributeError, RuntimeError, TypeError) as error:  # a private API
        return f"not available ({error})"


def collective() -> tuple[str, float]:
    """Return the name of the main thread's collective ('': none), and the time of the last change.

    The time is a value of `time.monotonic`. The functions `mean` and `broadcast` are not tracked.
    """
    return _collective, _changed


@contextmanager
def _waiting(name: str) -> Iterator[None]:
    global _collective, _changed
    _collective, _changed = name, time.monotonic()
    try:
        yield
    finally:
        _collective, _changed = "", time.monotonic()


def rank() -> int:
    """Return the rank of this process; also valid before joining and after leaving the group."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0"))


def world_size() -> int:
    """Return the number of processes in the group; 1 before joining and after leaving it."""
    return dist.get_world_size() if dist.is_initialized() else 1


def by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return dist.is_torchelastic_launched()


def mean(values: Tensor) -> Tensor:
    """Return the mean of a tensor over all processes, on every rank."""
    if world_size() == 1:
        return values
    values = values.clone()
    dist.all_reduce(values)
    return values / world_size()


def average(tensors: Sequence[Tensor]) -> None:
    """Average tensors of one dtype over all processes in place, in parts of about 64 MB."""
    if world_size() == 1:
        return
    parts: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if sum(t.nbytes for t in parts[-1]) > EXCHANGE:
            parts.append([])
        parts[-1].append(tensor)
    for part in parts:
        flat = torch.cat([tensor.flatten() for tensor in part])
        with _waiting("average"):
            dist.all_reduce(flat)
        flat /= world_size()
        pieces = flat.split([tensor.numel() for tensor in part])
        shaped = [piece.view_as(tensor) for piece, tensor in zip(pieces, part, strict=True)]
        torch._foreach_copy_(part, shaped)


def broadcast(tensors: Iterable[Tensor]) -> None:
    """Overwrite the tensors on all ranks with the tensors of rank 0."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def async_max(value: int) -> Callable[[], int]:
    """Start a maximum reduction over all ranks; return a function that waits for the maximum.

    The reduction runs on the CPU with gloo, concurrently with the main thread and the GPU.
    """
    if world_size() == 1:
        return lambda: value
    tensor = torch.tensor([value])
    work = dist.all_reduce(tensor, dist.ReduceOp.MAX, async_op=True)

    def result() -> int:
        with _waiting("reduction"):
            work.wait()
        return int(tensor)

    return result


def gather_objects(value: T) -> list[T]:
    """Return the objects of all ranks, ordered by rank, on rank 0; an empty list on other ranks."""
    if world_size() == 1:
        return [value]
    gathered: list | None = [None] * world_size() if rank() == 0 else None
    with _waiting("gather"):
        dist.gather_object(value, gathered)
    return gathered or []


def all_gather_objects(value: T) -> list[T]:
    """Return the objects of all ranks, ordered by rank, on every rank."""
    if world_size() == 1:
        return [value]
    gathered: list = [None] * world_size()
    with _waiting("all-gather"):
        dist.all_gather_object(gathered, value)
    return gathered


def reraise_on_all_ranks(make: Callable[[], T]) -> T:
    """Run `make` on every rank; on failure, raise the error of the lowest failed rank on all ranks.

    Without this, ranks that succeed would wait for failed ranks in their next collective. Only
    errors that a user can fix are covered: OSError, ValueError and LookupError.
    """
    results: list[T] = []
    failure: Exception | None = None
    try:
        results.append(make())
    except (OSError, ValueError, LookupError) as error:
        failure = error
    for raised in all_gather_objects(failure):
        if raised is not None:
            raise raised
    return results[0]


def rank0_result(make: Callable[[], T]) -> T:
    """Run `make` on rank 0 and return its result, or raise its error, on every rank."""
    return all_gather_objects(reraise_on_all_ranks(lambda: [make()] if rank() == 0 else []))[0][0]


def barrier() -> None:
    """Wait until all processes have reached this call."""
    if world_size() > 1:
        with _waiting("barrier"):
            dist.barrier()
