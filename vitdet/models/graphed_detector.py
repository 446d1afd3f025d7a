"""Detection as CUDA graphs (see `vitdet.kernels.cuda_graph`), where a detector and its device allow it."""

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
from vitdet.models.roi_heads import Found, detections
from vitdet.types import Detections

log = logging.getLogger(__name__)


class GraphedDetector:
    """What a detector finds in images, recorded for each size of a batch on a GPU; elsewhere the detector itself.

    Its weights may change. Where they come to lie elsewhere in memory (on another device, say), or its mode changes,
    all is recorded anew. Several threads may call it; the graphs serve one of them at a time. A copy or a pickle of it
    holds no graphs. `context`: in which it computes, autocast for instance.
    """

    def __init__(self, detector: nn.Module, context: Callable[[], AbstractContextManager]) -> None:
        self.detector, self.context = detector, context
        self.forget()

    def forget(self) -> None:
        """Be as before the first call."""
        self.lock = Lock()
        self.graph: CudaGraph[tuple[Found, Tensor | None]] = CudaGraph()
        self.state: tuple[int, ...] = ()  # of the detector that is recorded
        self.refused = False

    def __getstate__(self) -> dict[str, Any]:
        return {"detector": self.detector, "context": self.context}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.detector, self.context = state["detector"], state["context"]
        self.forget()

    def find(self, images: Tensor, sizes: Tensor) -> tuple[Found, Tensor | None]:
        """Slots of detections, and their masks."""
        assert isinstance(self.detector, Detector)
        with self.context():
            return self.detector.find(images, sizes)

    @torch.no_grad()
    def __call__(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """The detections of images (B, 3, S, S), best first; sizes (B, 2) as `Detector.forward` takes them."""
        if isinstance(self.detector, Detector) and enabled(images):
            with self.lock:
                found = self.replay(images, sizes)
            if found is not None:
                return found
        with self.context():
            return self.detector(images, None, sizes)

    def replay(self, images: Tensor, sizes: Tensor) -> list[Detections] | None:
        """As a call, by a graph; None if it cannot be recorded or has looked at too few candidates (`Found.exact`)."""
        tensors = chain(self.detector.parameters(), self.detector.buffers())
        state = (int(self.detector.training), *(tensor.data_ptr() for tensor in tensors))
        if state != self.state:
            self.graph, self.state, self.refused = CudaGraph(), state, False
        if not self.graph.has(images, sizes):
            if self.refused:
                return None
            try:
                self.graph.record(self.find, images, sizes)
            except NotRecorded as error:
                self.refused = True
                log.info("detection runs without a CUDA graph: %s", error)
                return None
        found, masks = self.graph(images, sizes)
        if not bool(found.exact.all()):
            return None
        own = Found(*(tensor.clone() for tensor in found))
        # waits for the copies, so that the next call, in whatever stream, may overwrite the originals
        return detections(own, None if masks is None else masks.clone())
