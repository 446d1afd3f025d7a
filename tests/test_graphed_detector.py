"""Detection through recorded graphs: threads, weights that move, copies and pickles; on a pretended graph and GPU."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from threading import Event, Thread

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.small import images, small_detector
from vitdet.models import graphed_detector
from vitdet.models.graphed_detector import GraphedDetector
from vitdet.predictor import Predictor
from vitdet.types import Detections

SIZES = torch.tensor([[128, 128]])


class Recorded:
    """Stands for a `CudaGraph`: each call writes to the same memory and computes with the weights' first places."""

    made: list[Recorded] = []
    during: Callable[[], object] = staticmethod(lambda: None)  # called after a replay

    def __init__(self) -> None:
        self.functions, self.outputs = dict[tuple, Callable](), dict[tuple, tuple]()
        self.made.append(self)

    def has(self, *tensors: Tensor) -> bool:
        return tuple(one.shape for one in tensors) in self.outputs

    def record(self, function: Callable, *tensors: Tensor) -> None:
        shapes = tuple(one.shape for one in tensors)
        self.functions[shapes], self.outputs[shapes] = function, function(*tensors)

    def __call__(self, *tensors: Tensor) -> tuple:
        shapes = tuple(one.shape for one in tensors)
        found, masks = self.outputs[shapes]
        now, now_masks = self.functions[shapes](*tensors)
        for static, new in zip((*found, masks), (*now, now_masks), strict=True):
            static.copy_(new)
        self.during()
        return found, masks


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Recorded]]:
    """The graphs that are made from now on."""
    monkeypatch.setattr(graphed_detector, "CudaGraph", Recorded)
    monkeypatch.setattr(graphed_detector, "enabled", lambda *_: True)
    monkeypatch.setattr(Recorded, "made", [])
    return Recorded.made


def recorded(made: list[Recorded]) -> int:
    """How many graphs were recorded."""
    return sum(len(one.outputs) for one in made)


def same(found: Detections, wanted: Detections) -> bool:
    return all(
        torch.equal(getattr(found, name), getattr(wanted, name)) for name in ("boxes", "scores")
    )


def test_what_a_thread_finds_is_not_overwritten_by_another(
    made: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = small_detector().eval()
    detect = GraphedDetector(detector, nullcontext)
    mine, theirs = images(1), images(1, seed=2)
    wanted = [detector(one, None, SIZES)[0] for one in (mine, theirs)]
    assert not same(*wanted)
    detect(mine, SIZES)
    found, replayed = dict[str, Detections](), Event()

    def other() -> None:
        found["theirs"] = detect(theirs, SIZES)[0]

    thread = Thread(target=other)

    def meanwhile() -> None:
        """Within the first thread's replay the second one begins; it would be done in 10 ms."""
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
        parameter.data = parameter.data.clone()  # as Module.to does


def replace_buffer(detector: nn.Module) -> None:
    detector.mean = detector.mean.clone()


@pytest.mark.parametrize("change", [reassign, move, replace_buffer, lambda one: one.train()])
def test_weights_elsewhere_are_recorded_anew(
    made: list[Recorded], change: Callable[[nn.Module], object]
) -> None:
    detector = small_detector().eval()
    detect = GraphedDetector(detector, nullcontext)
    detect(images(1), SIZES)
    before = made[-1]
    change(detector)
    detect(images(1), SIZES)
    assert made[-1] is not before and recorded(made) == 2


def test_weights_that_change_in_place_are_not(made: list[Recorded]) -> None:
    detector = small_detector().eval()
    detect = GraphedDetector(detector, nullcontext)
    detect(images(1), SIZES)
    detector.load_state_dict({name: one * 2 for name, one in detector.state_dict().items()})
    detect(images(1), SIZES)
    assert recorded(made) == 1


def test_a_detector_that_has_left_the_gpu_uses_no_graph(
    made: list[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    detect = GraphedDetector(small_detector().eval(), nullcontext)
    detect(images(1), SIZES)
    monkeypatch.setattr(graphed_detector, "enabled", lambda *_: False)
    monkeypatch.setattr(Recorded, "during", staticmethod(lambda: pytest.fail("replayed")))
    detect(images(1), SIZES)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_a_copy_of_a_predictor_is_one_of_its_own(
    made: list[Recorded], again: Callable[[Predictor], Predictor]
) -> None:
    predictor = Predictor(small_detector().eval(), ("a", "b", "c"), 128)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    wanted = predictor(picture, 0.0)
    copied = again(predictor)
    assert same(copied(picture, 0.0), wanted) and recorded(made) == 2
    assert copied.detector is copied.detect.detector is not predictor.detector
    assert copied.detect.context.args[1] is copied.detector


def test_memory_of_graphs_returns_with_the_last_reference(made: list[Recorded]) -> None:
    """A cycle would keep gigabytes until the garbage collector runs, which knows nothing of a GPU."""
    predictor = Predictor(small_detector().eval(), ("a", "b", "c"), 128)
    predictor(np.zeros((128, 128, 3), np.uint8))
    left = [weakref.ref(one) for one in (predictor, predictor.detect, predictor.detector)]
    gc.disable()
    try:
        made.pop().functions.clear()  # a `CudaGraph` keeps none
        del predictor
        assert [one() for one in left] == [None] * 3
    finally:
        gc.enable()


def test_another_detector_may_be_set(made: list[Recorded]) -> None:
    predictor = Predictor(small_detector().eval(), ("a", "b", "c"), 128)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    predictor(picture)
    other = small_detector(seed=1).eval()
    predictor.detector = other
    wanted = Predictor(other, ("a", "b", "c"), 128)(picture, 0.0)
    assert len(wanted) and same(predictor(picture, 0.0), wanted)
