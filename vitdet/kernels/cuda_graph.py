"""CUDA graphs: the kernels of a function are recorded once, and later launched by one call.

At small batch sizes, the host needs more time to launch a training step's thousands of kernels than
the GPU needs to run these kernels; with a graph, a step has about 90 launches.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

Output = TypeVar("Output")

LIMIT = 6  # maximum number of graphs
WARM_UPS = 2  # calls before the recording, which compile and select kernels
_recording = Lock()  # torch allows one recording at a time per process


class NotRecorded(Exception):
    """There is no graph for the shapes, or recording failed; the message states the reason."""


class NoRoom(NotRecorded):
    """There is no room for another graph: LIMIT graphs exist, or GPU memory is exhausted."""


class OutOfMemory(NoRoom):
    """Out of GPU memory during a recording; all graphs were cleared."""


class _Graph(NamedTuple, Generic[Output]):
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Output


class CudaGraph(Generic[Output]):
    """A function of tensors on a GPU, recorded for each set of input shapes.

    The function must not synchronize with the GPU, and tensors that it reads besides its arguments,
    such as weights, must not move in memory. Any later call may overwrite the results. Random
    numbers are drawn from the device's generator, as without a graph. No reference to the function
    is kept, so that no reference cycle delays freeing the graphs' memory.
    """

    def __init__(self) -> None:
        self.graphs: dict[tuple, _Graph[Output]] = {}
        self.pool: Any = None  # memory pool that the graphs share, as only one runs at a time
        # one stream for all recordings: a pool's memory belongs to one stream
        self.stream: torch.cuda.Stream | None = None

    def __call__(self, *tensors: Tensor) -> Output:
        """Copy tensors from the GPU or pinned memory to a graph's inputs, and replay the graph.

        Raises NotRecorded if there is no graph for the shapes of the tensors.
        """
        recorded = self.graphs.get(_shapes(tensors))
        if recorded is None:
            raise NotRecorded(f"no graph is recorded for the shapes {_shapes(tensors)}")
        for static, tensor in zip(recorded.inputs, tensors, strict=True):
            static.copy_(tensor, non_blocking=True)
        recorded.graph.replay()
        return recorded.output

    def clear(self) -> None:
        """Free the memory of all graphs; their results become invalid."""
        self.graphs.clear()
        self.pool = None

    def has(self, *tensors: Tensor) -> bool:
        """Return whether a graph is recorded for tensors of these shapes."""
        return _shapes(tensors) in self.graphs

    def record(self, function: Callable[..., Output], *tensors: Tensor) -> None:
        """Record function(*tensors) for tensors of these shapes; calls `function` several times.

        The state of the device's random generator does not change.

        Raises:
            NotRecorded: the function failed, e.g. because it synchronizes with the GPU.
            NoRoom: LIMIT graphs exist.
            OutOfMemory: there is not enough GPU memory; all graphs are cleared.
        """
        if len(self.graphs) == LIMIT:
            raise NoRoom(f"{LIMIT} graphs are already recorded, for other shapes")
        device = tensors[0].device if tensors[0].is_cuda else torch.device("cuda")
        # launches and the recording's synchronization use the current device
        with _recording, torch.cuda.device(device):
            self._record(function, device, tensors)

    def _record(
        self, function: Callable[..., Output], device: torch.device, tensors: tuple[Tensor, ...]
    ) -> None:
        random = torch.cuda.get_rng_state(device)
        # tensors created in inference mode can only be written in inference mode
        with torch.inference_mode(False):
            inputs = tuple(tensor.to(device, copy=True) for tensor in tensors)
        graph = torch.cuda.CUDAGraph()
        stream = self.stream = self.stream or torch.cuda.Stream(device)
        options = {"pool": self.pool, "stream": stream, "capture_error_mode": "thread_local"}
        try:
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    function(*inputs)
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()  # release cached memory, which a graph cannot use
            with torch.cuda.graph(graph, **options):
                output = function(*inputs)
        except RuntimeError as error:
            kind = OutOfMemory if isinstance(error, torch.OutOfMemoryError) else NotRecorded
            if kind is OutOfMemory:
                self.clear()
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
            reason = str(error).strip() or type(error).__name__
            raise kind(reason.splitlines()[0]) from error
        finally:
            torch.cuda.set_rng_state(random, device)
        self.pool = graph.pool()
        self.graphs[_shapes(tensors)] = _Graph(graph, inputs, output)


def _shapes(tensors: tuple[Tensor, ...]) -> tuple:
    return tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors)
