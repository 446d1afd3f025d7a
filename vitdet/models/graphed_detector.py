"""Detection with CUDA graphs (`vitdet.kernels.cuda_graph`), if model and device support them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import chain
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from vitdet.kernels import enabled
from vitdet.kernels.cuda_graph import CudaGraph, NotRecorded
from vitdet.models.detector import Detector
from vitdet.models.roi_heads import Found, Scored, detections
from vitdet.types import Detections

log = logging.getLogger(__name__)

Output = tuple[list[Tensor], Scored, Found, Tensor | None]


class GraphedDetector:
    """A detector that records its inference on a GPU as one CUDA graph per batch shape.

    Weights may be updated in place. If they move in memory (for example, to a different device), or
    if the training mode or one of `Detector.limits` changes, all graphs are recorded again. The
    detector may be called from several threads; the graphs run one at a time. Copies and pickles
    contain no graphs. `context` creates the context manager for inference, e.g. autocast.
    """

    def __init__(self, detector: nn.Module, context: Callable[[], AbstractContextManager]) -> None:
        self.detector, self.context = detector, context
        self.lock = Lock()
        self.graph: CudaGraph[Output] = CudaGraph()
        self.state: tuple[float, ...] = ()  # training mode, limits and weight addresses
        self.refused: set[tuple[int, ...]] = set()  # image shapes for which recording failed

    def __reduce__(self) -> tuple[Any, ...]:
        return GraphedDetector, (self.detector, self.context)

    def find(self, images: Tensor, sizes: Tensor) -> Output:
        """Return the pyramid's maps, scored proposals, detections and, with a mask head, masks."""
        assert isinstance(self.detector, Detector)
        with self.context():
            features, scored, found = self.detector.find(images, sizes)
            return features, scored, found, self.detector.roi_heads.masks(features, found)

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """Return the detections of images (B, 3, S, S); sizes (B, 2) as in `Detector.forward`."""
        if isinstance(self.detector, Detector) and enabled(images):
            with self.lock:
                found = self.replay(images, sizes)
            if found is not None:
                return found
        with self.context():
            return self.detector(images, None, sizes)

    def replay(self, images: Tensor, sizes: Tensor) -> list[Detections] | None:
        """Record a graph if necessary, and replay it; return None if recording failed."""
        detector = self.detector
        assert isinstance(detector, Detector)
        addresses = (x.data_ptr() for x in chain(detector.parameters(), detector.buffers()))
        state = (int(detector.training), *detector.limits(), *addresses)
        if state != self.state:
            self.graph, self.state, self.refused = CudaGraph(), state, set()
        if not self.graph.has(images, sizes):
            shape = tuple(images.shape)
            if shape in self.refused:
                return None
            try:
                self.graph.record(self.find, images, sizes)
            except NotRecorded as error:
                self.refused.add(shape)
                batch = f"{shape[0]} ({shape[2]} x {shape[3]} pixels)"
                log.info("detection with batch size %s runs without a CUDA graph: %s", batch, error)
                return None
        features, scored, found, masks = self.graph(images, sizes)
        if not bool(found.exact.all()):
            with self.context():
                return detector.roi_heads.finish(features, scored, found)
        copies = Found(*(tensor.clone() for tensor in found))
        # `detections` waits for these copies, so that the next replay may overwrite the originals
        return detections(copies, None if masks is None else masks.clone())
