"""The forward and backward pass of a training step as CUDA graphs (`vitdet.kernels.cuda_graph`).

The tensors of a graph have fixed sizes. Therefore the targets are padded: the numbers of objects
per image and of polygon edges per batch become powers of two. A graph is recorded for each
combination of the two numbers. All graphs add to the same gradient tensors, which accumulate over
micro-batches and are then averaged over all processes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vitdet import distributed
from vitdet.kernels.cuda_graph import CudaGraph, NoRoom, NotRecorded, OutOfMemory
from vitdet.models import Detector
from vitdet.models.layers import Blocks
from vitdet.types import Polygons, Target, Targets

SLOTS, EDGES = 16, 2**12  # minimum padded sizes: objects per image, edges per batch
CLEARINGS = 8  # maximum number of calls of `make_room` between two evaluations
log = logging.getLogger(__name__)

Losses = dict[str, Tensor]
Run = Callable[[Tensor, Targets, Tensor], Losses]


class GraphedGradients:
    """CUDA graphs of `run`, which adds to the gradients and returns the losses of a batch.

    If `run` cannot be recorded for targets of some size, it runs without a graph; the size is
    logged. Recording is tried again after `release` if the maximum number of graphs existed, or if
    it ran out of memory for the first time. All graphs may be cleared to free memory for a step.
    """

    def __init__(self, detector: Detector, run: Run) -> None:
        self.parameters = [p for p in detector.parameters() if p.requires_grad]
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.run = run
        self.graph: CudaGraph[Losses] = CudaGraph()
        # padded sizes that could not be recorded -> whether to try again after `release`
        self.refused: dict[tuple[int, int], bool] = {}
        self.large: set[tuple[int, int]] = set()  # sizes whose recording ran out of memory
        self.clearings = 0  # number of calls of `make_room` since the last `release`

    def __call__(self, images: Tensor, targets: Targets, sizes: Tensor) -> Losses:
        """Return a batch's losses, which the next call may overwrite; targets: from `padded`."""
        tensors = (images, sizes, *targets.tensors())
        shape = (targets.boxes.shape[1], len(targets.masks.edges))
        known = self.graph.has(*tensors) or shape in self.refused
        if not known and self.clearings < CLEARINGS:
            self.record(shape, *tensors)
        if self.graph.has(*tensors):
            return self.graph(*tensors)
        if shape in self.large and self.graph.graphs:
            self.make_room()
        return self.run(images, targets, sizes)

    def record(self, shape: tuple[int, int], *tensors: Tensor) -> None:
        """Record the step for tensors of these shapes; the gradients are not changed."""
        gradients = self.gradients()
        kept = [gradient.clone() for gradient in gradients]

        def run(images: Tensor, sizes: Tensor, *targets: Tensor) -> Losses:
            return self.run(images, Targets.from_tensors(*targets), sizes)

        try:
            self.graph.record(run, *tensors)
        except NotRecorded as error:
            again = isinstance(error, NoRoom)
            if isinstance(error, OutOfMemory):
                again = shape not in self.large
                self.large.add(shape)
            self.refused[shape] = again
            if distributed.rank() == 0:
                until = " until the next evaluation" if again else ""
                steps = f"steps padded to {shape[0]} objects per image and {shape[1]} edges"
                log.info(f"{steps} run without a CUDA graph{until}: {error}")
        torch._foreach_copy_(gradients, kept)

    def make_room(self) -> None:
        """Clear the graphs to make room for a step that may not fit in memory alongside them."""
        self.graph.clear()
        self.clearings += 1
        if self.clearings == CLEARINGS and distributed.rank() == 0:
            log.info(
                "steps run without CUDA graphs until the next evaluation: "
                f"the graphs were cleared {CLEARINGS} times to free memory for steps"
            )

    def release(self) -> None:
        """Free the memory of the graphs, which are recorded again when needed."""
        self.graph.clear()
        self.refused = {shape: again for shape, again in self.refused.items() if not again}
        self.clearings = 0

    def gradients(self) -> list[Tensor]:
        """Return the gradient tensors."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]


def can_be_graphed(detector: nn.Module) -> bool:
    """Return whether a training step can be a CUDA graph, i.e. changes only the gradients.

    BatchNorm also changes its statistics; activation checkpointing also changes the random state.
    """
    return not any(
        isinstance(module, nn.modules.batchnorm._BatchNorm)
        or (isinstance(module, Blocks) and module.checkpointing)
        for module in detector.modules()
    )


def padded(targets: Sequence[Target], device: torch.device) -> Targets:
    """Pad the targets to the sizes of a graph; copy them to the device without synchronization."""
    most = max(SLOTS, *(len(target) for target in targets))
    found = Targets.of(targets, power_of_two(most))
    edges = found.masks.edges
    spare = power_of_two(max(len(edges), EDGES)) - len(edges)
    masks = Polygons(F.pad(edges, (0, 0, 0, spare)), found.masks.spans)
    tensors = (tensor.pin_memory() for tensor in replace(found, masks=masks).tensors())
    return Targets.from_tensors(*tensors).to(device, non_blocking=True)


def power_of_two(number: int) -> int:
    """Return the smallest power of two that is at least `number` (positive)."""
    return 1 << (number - 1).bit_length()
