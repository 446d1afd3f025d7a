"""Detection as CUDA graphs (see `vitdet.kernels.cuda_graph`), where a detector and its device allow it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from vitdet.kernels import enabled
from vitdet.kernels.cuda_graph import CudaGraph, NotRecorded
from vitdet.models.detector import Detector
from vitdet.models.roi_heads import Found, detections
from vitdet.types import Detections

log = logging.getLogger(__name__)


class GraphedDetector:
    """What a detector finds in images, recorded for each size of a batch on a GPU; elsewhere the detector itself.

    Its weights may change, but not their place in memory. `context`: in which it computes, autocast for instance.
    """

    def __init__(self, detector: nn.Module, context: Callable[[], AbstractContextManager]) -> None:
        self.detector, self.context = detector, context
        self.graph: CudaGraph[tuple[Found, Tensor | None]] = CudaGraph(self.find)
        self.refused = not isinstance(detector, Detector)

    def find(self, images: Tensor, sizes: Tensor) -> tuple[Found, Tensor | None]:
        """Slots of detections, and their masks."""
        assert isinstance(self.detector, Detector)
        with self.context():
            return self.detector.find(images, sizes)

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """The detections of images (B, 3, S, S), best first; sizes (B, 2) as `Detector.forward` takes them."""
        if not self.refused and enabled(images):
            try:
                if not self.graph.has(images, sizes):
                    self.graph.record(images, sizes)
            except NotRecorded as error:
                self.refused = True
                log.info("detection runs without a CUDA graph: %s", error)
        if self.graph.has(images, sizes):
            found, masks = self.graph(images, sizes)
            if bool(found.exact.all()):
                own = Found(*(tensor.clone() for tensor in found))
                return detections(own, None if masks is None else masks.clone())
        with self.context():
            return self.detector(images, None, sizes)
