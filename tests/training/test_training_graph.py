"""Training steps that cannot be recorded as a CUDA graph: kinds, retries and log lines."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.helpers.small import images, small_detector, target
from tests.helpers.triton_device import needs_gpu
from vitdet.kernels.cuda_graph import CudaGraph, NoRoom, NotRecorded, OutOfMemory
from vitdet.training import graph as training_graph
from vitdet.training.graph import CLEARINGS, GraphedGradients, padded
from vitdet.types import Targets

SIZES = torch.tensor([[128, 128]])


class Recorded:
    """Simulates a `CudaGraph` with memory for a limited number of objects per image."""

    capacity = 64
    error: NotRecorded | None = None

    def __init__(self) -> None:
        self.graphs: dict[int, Callable] = {}
        self.replayed = 0

    def has(self, *tensors: Tensor) -> bool:
        return tensors[2].shape[1] in self.graphs

    def record(self, function: Callable, *tensors: Tensor) -> None:
        if self.error:
            raise self.error
        if tensors[2].shape[1] > self.capacity:
            self.clear()
            raise OutOfMemory("out of memory")
        function(*tensors)  # like a warm-up
        self.graphs[tensors[2].shape[1]] = function

    def __call__(self, *tensors: Tensor) -> dict[str, Tensor]:
        self.replayed += 1
        return self.graphs[tensors[2].shape[1]](*tensors)

    def clear(self) -> None:
        self.graphs.clear()


class Steps:
    """Graphed steps of one weight, whose gradient grows by 1 per step."""

    def __init__(self) -> None:
        self.detector = torch.nn.Linear(1, 1, bias=False)
        self.graphed = GraphedGradients(self.detector, self.run)
        self.running = list[int]()

    def run(self, images: Tensor, targets: Targets, sizes: Tensor) -> dict[str, Tensor]:
        self.running.append(targets.boxes.shape[1])
        self.detector.weight.grad += 1
        return {}

    def __call__(self, slots: int) -> bool:
        """Return whether a step with this number of object slots replays a graph."""
        before, gradient = self.graphed.graph.replayed, self.detector.weight.grad.item()
        targets = Targets.of([target([[10, 10, 50, 60]], [1])], slots=slots)
        self.graphed(images(1), targets, SIZES)
        assert self.detector.weight.grad.item() == gradient + 1  # even if recording failed
        return self.graphed.graph.replayed > before


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Steps:
    monkeypatch.setattr(training_graph, "CudaGraph", Recorded)
    monkeypatch.setattr(Recorded, "capacity", 64)
    caplog.set_level(logging.INFO)
    return Steps()


def test_a_size_that_exceeds_the_memory_is_retried_once_after_an_evaluation(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert steps(16) and not steps(128) and not steps(128) and steps(16)
    text = "steps padded to 128 objects per image and 4 edges run without a CUDA graph"
    assert caplog.messages == [f"{text} until the next evaluation: out of memory"]
    steps.graphed.release()
    assert not steps(128) and caplog.messages[1:] == [f"{text}: out of memory"]
    assert not steps(256)
    monkeypatch.setattr(Recorded, "capacity", 256)
    assert not steps(256)
    steps.graphed.release()
    assert not steps(128) and steps(64) and steps(256) and len(caplog.messages) == 3


def test_a_step_out_of_memory_releases_the_graphs(
    steps: Steps, caplog: pytest.LogCaptureFixture
) -> None:
    """Repeated recording costs more than it saves, so graphs are disabled after a few attempts."""
    assert not steps(128)
    for _ in range(CLEARINGS):
        assert steps(16) and not steps(128) and not steps.graphed.graph.graphs
    assert not steps(16)
    text = f": the graphs were cleared {CLEARINGS} times to free memory for steps"
    assert caplog.messages[1:] == [f"steps run without CUDA graphs until the next evaluation{text}"]
    steps.graphed.release()
    assert steps(16)


def test_sizes_beyond_the_maximum_of_graphs_wait_for_the_next_evaluation(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Recorded, "error", NoRoom("6 graphs are already recorded"))
    for _ in range(3):
        assert not steps(32) and not steps(32)
        steps.graphed.release()
    assert len(caplog.messages) == 3
    assert all("until the next evaluation: 6 graphs" in message for message in caplog.messages)
    monkeypatch.setattr(Recorded, "error", None)
    assert steps(32)


def test_steps_that_wait_for_the_gpu_are_not_retried(
    steps: Steps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Recorded, "error", NotRecorded("operation not permitted"))
    assert not steps(16)
    monkeypatch.setattr(Recorded, "error", None)
    steps.graphed.release()
    assert not steps(16)
    assert caplog.messages == [
        "steps padded to 16 objects per image and 4 edges run without a CUDA graph: operation not permitted"
    ]


@needs_gpu
@pytest.mark.cuda
def test_a_step_that_waits_runs_without_a_graph_on_a_gpu(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    detector = small_detector().cuda().train()

    def run(images: Tensor, targets: Targets, sizes: Tensor) -> dict[str, Tensor]:
        losses = detector(images, targets, sizes)
        total = sum(losses.values())
        assert total.item() > 0  # waits for the GPU, which stream capture does not permit
        total.backward()
        return losses

    graphed, sizes = GraphedGradients(detector, run), SIZES.cuda()
    pixels, targets = images(1).cuda(), padded([target([[10, 10, 50, 60]], [1])], sizes.device)
    for _ in range(2):
        graphed.release()
        assert all(loss.isfinite() for loss in graphed(pixels, targets, sizes).values())
    (line,) = caplog.messages
    assert line.startswith(
        "steps padded to 16 objects per image and 4096 edges run without a CUDA graph"
    )
    assert not graphed.graph.graphs


@needs_gpu
@pytest.mark.cuda
def test_a_graph_that_does_not_fit_on_a_gpu_leaves_it_usable() -> None:
    graphs: CudaGraph[Tensor] = CudaGraph()
    ones = torch.ones(4, device="cuda")
    graphs.record(lambda x: x + 1, ones)
    with pytest.raises(OutOfMemory, match="out of memory"):
        graphs.record(lambda x: torch.empty(2**46, device=x.device) + x.sum(), torch.ones(8).cuda())
    assert not graphs.graphs and graphs.pool is None
    graphs.record(lambda x: x + 2, ones)
    assert graphs(ones).tolist() == [3.0] * 4
