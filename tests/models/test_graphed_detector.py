"""Detection by CUDA graphs: threads, replaced weights, copies and pickles."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from threading import Event, Thread

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.small import images, small_detector
from tests.helpers.triton_device import needs_gpu
from vitdet.kernels.cuda_graph import NotRecorded
from vitdet.models import graphed_detector
from vitdet.models.detector import Detector
from vitdet.models.graphed_detector import GraphedDetector
from vitdet.predictor import Predictor
from vitdet.types import Detections

SIZES = torch.tensor([[128, 128]])


class Recorded:
    """Simulates a `CudaGraph`: each call writes to the same memory."""

    made: list[Recorded] = []
    during: Callable[[], object] = staticmethod(lambda: None)  # called after a replay

    def __init__(self) -> None:
        self.functions, self.outputs = dict[tuple, Callable](), dict[tuple, tuple]()
        self.made.append(self)

    def has(self, *tensors: Tensor) -> bool:
        return tuple(tensor.shape for tensor in tensors) in self.outputs

    def record(self, function: Callable, *tensors: Tensor) -> None:
        shapes = tuple(tensor.shape for tensor in tensors)
        self.functions[shapes], self.outputs[shapes] = function, function(*tensors)

    def __call__(self, *tensors: Tensor) -> tuple:
        shapes = tuple(tensor.shape for tensor in tensors)
        static, new = (flat(of) for of in (self.outputs[shapes], self.functions[shapes](*tensors)))
        for buffer, other in zip(static, new, strict=True):
            buffer.copy_(other)
        self.during()
        return self.outputs[shapes]


def flat(output: tuple) -> list[Tensor]:
    features, scored, found, masks = output
    return [*features, *scored, *found, masks]


@pytest.fixture
def detector(monkeypatch: pytest.MonkeyPatch) -> Detector:
    """A detector with simulated graphs."""
    monkeypatch.setattr(graphed_detector, "CudaGraph", Recorded)
    monkeypatch.setattr(graphed_detector, "enabled", lambda *_: True)
    monkeypatch.setattr(Recorded, "made", [])
    return small_detector().eval()


@pytest.fixture
def detect(detector: Detector) -> GraphedDetector:
    return GraphedDetector(detector, nullcontext)


def predictor_of(detector: Detector, precision: str = "auto") -> Predictor:
    return Predictor(detector, ("a", "b", "c"), 128, precision=precision)


PICTURE = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)


def recorded() -> int:
    """Return the number of recorded graphs."""
    return sum(len(graph.outputs) for graph in Recorded.made)


def same(found: Detections, wanted: Detections) -> bool:
    return torch.equal(found.boxes, wanted.boxes) and torch.equal(found.scores, wanted.scores)


def test_threads_do_not_overwrite_results_of_other_threads(
    detect: GraphedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, theirs = images(1), images(1, seed=2)
    wanted = [detect.detector(pixels, None, SIZES)[0] for pixels in (mine, theirs)]
    assert not same(*wanted)
    detect(mine, SIZES)
    found, replayed = dict[str, Detections](), Event()

    def other() -> None:
        found["theirs"] = detect(theirs, SIZES)[0]

    thread = Thread(target=other)

    def meanwhile() -> None:
        """In the first replay, start the second thread, which ends within 10 ms without a lock."""
        if thread.ident is None:
            thread.start()
            assert not replayed.wait(0.5)
        else:
            replayed.set()

    monkeypatch.setattr(Recorded, "during", staticmethod(meanwhile))
    found["mine"] = detect(mine, SIZES)[0]
    thread.join()
    assert replayed.is_set()
    assert same(found["mine"], wanted[0]) and same(found["theirs"], wanted[1])


def reassign(detector: nn.Module) -> None:
    state = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    detector.load_state_dict(state, assign=True)


def move(detector: nn.Module) -> None:
    for parameter in detector.parameters():
        parameter.data = parameter.data.clone()  # like Module.to


def replace_buffer(detector: nn.Module) -> None:
    detector.mean = detector.mean.clone()


@pytest.mark.parametrize("change", [reassign, move, replace_buffer, lambda model: model.train()])
def test_weights_at_new_addresses_cause_a_new_recording(
    detect: GraphedDetector, change: Callable[[nn.Module], object]
) -> None:
    detect(images(1), SIZES)
    before = Recorded.made[-1]
    change(detect.detector)
    detect(images(1), SIZES)
    assert Recorded.made[-1] is not before and recorded() == 2


def test_weights_changed_in_place_cause_no_new_recording(detect: GraphedDetector) -> None:
    detect(images(1), SIZES)
    detector = detect.detector
    detector.load_state_dict({name: tensor * 2 for name, tensor in detector.state_dict().items()})
    detect(images(1), SIZES)
    assert recorded() == 1


def test_a_detector_moved_off_the_gpu_uses_no_graph(
    detect: GraphedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect(images(1), SIZES)
    monkeypatch.setattr(graphed_detector, "enabled", lambda *_: False)
    monkeypatch.setattr(Recorded, "during", staticmethod(lambda: pytest.fail("replayed")))
    detect(images(1), SIZES)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_a_predictor_is_independent(
    detector: Detector, again: Callable[[Predictor], Predictor]
) -> None:
    predictor = predictor_of(detector)
    wanted = predictor(PICTURE, 0.0)
    copied = again(predictor)
    assert same(copied(PICTURE, 0.0), wanted) and recorded() == 2
    assert copied.detector is copied.detect.detector is not predictor.detector
    assert copied.detect.context.args[1] is copied.detector


@pytest.mark.usefixtures("detector")
def test_graph_memory_is_freed_with_the_last_reference() -> None:
    """A reference cycle would keep gigabytes until garbage collection."""
    predictor = predictor_of(small_detector().eval())
    predictor(PICTURE)
    left = [weakref.ref(part) for part in (predictor, predictor.detect, predictor.detector)]
    gc.disable()
    try:
        Recorded.made.pop().functions.clear()  # a `CudaGraph` does not store functions
        del predictor
        assert [reference() for reference in left] == [None] * 3
    finally:
        gc.enable()


def test_the_detector_may_be_replaced(detector: Detector) -> None:
    predictor = predictor_of(detector)
    predictor(PICTURE)
    predictor.detector = other = small_detector(seed=1).eval()
    wanted = predictor_of(other)(PICTURE, 0.0)
    assert len(wanted) and same(predictor(PICTURE, 0.0), wanted)


@pytest.mark.parametrize(
    ("part", "name", "value"),
    [("rpn", "nms_iou", 0.2), ("rpn", "top_test", (30, 3)), ("roi_heads", "nms_iou", 0.0)]
    + [("roi_heads", "score_threshold", 0.6), ("roi_heads", "max_detections", 2)],
)
def test_a_changed_limit_is_applied(
    detect: GraphedDetector, part: str, name: str, value: object
) -> None:
    detector = detect.detector
    before = detect(images(1), SIZES)[0]
    setattr(detector.get_submodule(part), name, value)
    wanted = detector(images(1), None, SIZES)[0]
    found = detect(images(1), SIZES)[0]
    assert not same(wanted, before) and same(found, wanted) and recorded() == 2


def test_the_precision_may_be_changed(detector: Detector) -> None:
    predictor = predictor_of(detector, "fp32")
    exact = predictor(PICTURE, 0.0)
    predictor.precision = "bf16"
    wanted = predictor_of(detector, "bf16")(PICTURE, 0.0)
    assert same(predictor(PICTURE, 0.0), wanted) and not same(wanted, exact)
    message = "precision: expected one of fp32, bf16, fp16, auto, got 'fp8'"
    with pytest.raises(ValueError, match=message):
        predictor.precision = "fp8"
    assert predictor.precision == "bf16"


def test_more_candidates_need_no_second_backbone_pass(
    detect: GraphedDetector, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = detect.detector
    wanted = detector(images(1), None, SIZES)[0]
    monkeypatch.setattr("vitdet.models.roi_heads.CANDIDATES", 3)
    detect(images(1), SIZES)
    passes = []
    detector.backbone.register_forward_hook(lambda *_: passes.append(1))
    found = detect(images(1), SIZES)[0]
    assert len(passes) == 1  # the simulated replay runs the backbone once
    assert same(found, wanted) and torch.equal(found.masks, wanted.masks)


def test_a_batch_that_cannot_be_recorded_keeps_other_graphs(
    detect: GraphedDetector, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    record, tries = Recorded.record, []

    def refuse(self: Recorded, function: Callable, *tensors: Tensor) -> None:
        tries.append(len(tensors[0]))
        if len(tensors[0]) == 2:
            raise NotRecorded("out of memory")
        record(self, function, *tensors)

    monkeypatch.setattr(Recorded, "record", refuse)
    for count in (2, 1, 2, 1):
        found = detect(images(count), SIZES.repeat(count, 1))
        wanted = detect.detector(images(count), None, SIZES.repeat(count, 1))
        assert all(same(detections, other) for detections, other in zip(found, wanted, strict=True))
    (line,) = caplog.messages
    size = "batch size 2 (128 x 128 pixels)"
    assert tries == [2, 1]
    assert line == f"detection with {size} runs without a CUDA graph: out of memory"


@needs_gpu
@pytest.mark.cuda
def test_models_that_wait_for_the_gpu_run_without_a_graph(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    detector, sizes = small_detector().cuda().eval(), SIZES.cuda()
    detector.backbone.register_forward_hook(lambda _, __, maps: print(float(maps.sum())))
    detect = GraphedDetector(detector, nullcontext)
    wanted = detector(images(1).cuda(), None, sizes)[0]
    for _ in range(2):
        assert same(detect(images(1).cuda(), sizes)[0], wanted)
    (line,) = caplog.messages
    assert "batch size 1 (128 x 128 pixels) runs without a CUDA graph: " in line
